"""``bi_inductor::recurrence``: one recurrent layer in one direction, step after step, and its gradient.

    recurrence(steps [T, B, G], states [B, S] each, weight [G, H], bias [G], projection [P, S], cell)
        -> every state after every step, [T, B, S] each; the first is the hidden state h

``steps`` holds the products of the inputs, a_t. Every step is one product of the hidden state and pointwise ops, each
rounded to its dtype; the association of the two products is part of the meaning::

    u_t   = round(sum_k h[k] * weight[n, k] + bias[n])             k ascending, one accumulator
    rnn   h' = tanh or relu(a_t + u_t)
    lstm  i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the quarters of a_t + u_t
          c' = f * c + i * g,  m = o * tanh(c'),  h' = m, or with a projection round(sum_k m[k] * projection[p, k])
    gru   r, z = sigmoid of the first thirds of a_t + u_t,  n = tanh(a_t[n] + r * u_t[n]),  h' = (h - n) * z + n

The gradient computes u_t again, as one product, and goes back through the steps; each adds the gradient of its outputs
to that of the next step. Weights have one product or sum over (row, step), the row outermost: sums of all steps are not
rounded on the way, and micro-batches can go on from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import _LIBRARY

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One kind of cell.

    ``update(a, u, states)``: the states after a step, h before its projection. ``parts(a, u, before, after)``: what
    the gradient of a step needs, for any leading dims. ``reverse(gradients, parts)``: from the gradients of the states
    after a step, those of a, of u (the same tensor where they are equal) and of the states before, as far as they do
    not come through u (None: not at all).
    """

    update: Callable[[Tensor, Tensor, States], States]
    parts: Callable[[Tensor, Tensor, States, States], States]
    reverse: Callable[[States, States], tuple[Tensor, Tensor, tuple[Tensor | None, ...]]]


def _gates(a: Tensor, u: Tensor) -> States:
    ingate, forget, cell, outgate = (a + u).chunk(4, -1)
    return ingate.sigmoid(), forget.sigmoid(), cell.tanh(), outgate.sigmoid()


def _lstm(a: Tensor, u: Tensor, states: States) -> States:
    ingate, forget, cell, outgate = _gates(a, u)
    memory = forget * states[1] + ingate * cell
    return outgate * memory.tanh(), memory


def _lstm_parts(a: Tensor, u: Tensor, before: States, after: States) -> States:
    return *_gates(a, u), after[1].tanh(), before[1]


def _lstm_reverse(gradients: States, parts: States) -> Any:
    ingate, forget, cell, outgate, shown, before = parts
    hidden, memory = gradients
    memory = memory + hidden * outgate * (1 - shown * shown)
    gates = (
        memory * cell * (ingate * (1 - ingate)),
        memory * before * (forget * (1 - forget)),
        memory * ingate * (1 - cell * cell),
        hidden * shown * (outgate * (1 - outgate)),
    )
    both = torch.cat(gates, -1)
    return both, both, (None, memory * forget)


def _gru_gates(a: Tensor, u: Tensor) -> States:
    (a_reset, a_update, a_new), (u_reset, u_update, u_new) = a.chunk(3, -1), u.chunk(3, -1)
    reset, update = (a_reset + u_reset).sigmoid(), (a_update + u_update).sigmoid()
    return reset, update, (a_new + reset * u_new).tanh(), u_new


def _gru(a: Tensor, u: Tensor, states: States) -> States:
    _, update, new, _ = _gru_gates(a, u)
    return ((states[0] - new) * update + new,)


def _gru_parts(a: Tensor, u: Tensor, before: States, after: States) -> States:
    return *_gru_gates(a, u), before[0]


def _gru_reverse(gradients: States, parts: States) -> Any:
    reset, update, new, u_new, before = parts
    (hidden,) = gradients
    of_new = hidden * (1 - update) * (1 - new * new)
    of_reset = of_new * u_new * (reset * (1 - reset))
    of_update = hidden * (before - new) * (update * (1 - update))
    of_a, of_u = (torch.cat([of_reset, of_update, last], -1) for last in (of_new, of_new * reset))
    return of_a, of_u, (hidden * update,)


def _rnn(activation: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor]) -> Cell:
    def reverse(gradients: States, parts: States) -> Any:
        both = slope(gradients[0], parts[0])
        return both, both, (None,)

    return Cell(lambda a, u, states: (activation(a + u),), lambda a, u, before, after: after, reverse)


CELLS = {
    "lstm": Cell(_lstm, _lstm_parts, _lstm_reverse),
    "gru": Cell(_gru, _gru_parts, _gru_reverse),
    "rnn_tanh": _rnn(torch.tanh, lambda gradient, h: gradient * (1 - h * h)),
    "rnn_relu": _rnn(torch.relu, lambda gradient, h: torch.where(h > 0, gradient, 0.0)),
}


# ---------------------------------------------------------------- one step, forward and back


def forward_step(cell: str, count: int, has_bias: bool, projected: bool) -> Callable[..., list[Tensor]]:
    """(states, a_t, weight, bias, projection) -> the states after the step, and once more as its outputs."""

    def step(*given: Tensor) -> list[Tensor]:
        states, (a, weight, *rest) = given[:count], given[count:]
        bias = rest[0] if has_bias else None
        states = CELLS[cell].update(a, hidden_product(states[0], weight, bias), states)
        if projected:
            states = (torch.mm(states[0], rest[-1].t()), *states[1:])
        return [*states, *(state.clone() for state in states)]

    return step


def backward_step(cell: str, count: int, projected: bool) -> Callable[..., list[Tensor]]:
    """(gradients from the next step, those of the outputs, parts, weight, projection) -> gradients for the step
    before; of a, of u if that is another, and of h behind its projection."""

    def step(*given: Tensor) -> list[Tensor]:
        later, direct, rest = given[:count], given[count : 2 * count], given[2 * count :]
        total = tuple(x + y for x, y in zip(later, direct, strict=True))
        parts, weight = (rest[:-2], rest[-2]) if projected else (rest[:-1], rest[-1])
        top = torch.mm(total[0], rest[-1]) if projected else total[0]
        of_a, of_u, before = CELLS[cell].reverse((top, *total[1:]), parts)
        through = torch.mm(of_u, weight)
        hidden = through if before[0] is None else through + before[0]
        emitted = [of_a] + ([] if of_u is of_a else [of_u]) + ([total[0]] if projected else [])
        return [hidden, *before[1:], *(x.clone() for x in emitted)]  # type: ignore[list-item]

    return step


def hidden_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u of ``hidden [B, H]``."""
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


def looped(
    step: Callable[..., list[Tensor]], init: Sequence[Tensor], xs: Sequence[Tensor], rest: Sequence[Tensor]
) -> Any:
    """What the ``scan`` of ``step`` computes: carries and stacked outputs."""
    carry, outputs = list(init), []
    for now in zip(*(x.unbind(0) for x in xs), strict=True):
        result = step(*carry, *now, *rest)
        carry = result[: len(carry)]
        outputs.append(result[len(carry) :])
    return [*carry, *(torch.stack(x) for x in zip(*outputs, strict=True))]


# ---------------------------------------------------------------- the two ops

_LIBRARY.define(
    "recurrence(Tensor steps, Tensor[] states, Tensor weight, Tensor? bias, Tensor? projection, str cell) -> Tensor[]"
)
_LIBRARY.define(
    "recurrence_backward(Tensor[] gradients, Tensor[] parts, Tensor weight, Tensor? projection, str cell) -> Tensor[]"
)
recurrence = torch.ops.bi_inductor.recurrence.default
recurrence_backward = torch.ops.bi_inductor.recurrence_backward.default
"""Gradients and parts ``[T, B, .]`` -> gradients of the first states; then for all steps those of a, of u if they are
others, and of h if it is projected."""


def forward(scan: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """``recurrence`` with its steps run by ``scan``."""

    def run(
        steps: Tensor,
        states: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor | None,
        cell: str,
    ) -> list[Tensor]:
        step = forward_step(cell, len(states), bias is not None, projection is not None)
        rest = [x for x in (weight, bias, projection) if x is not None]
        return list(scan(step, states, [steps], rest)[len(states) :])

    return run


def backward(scan: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """``recurrence_backward`` with its steps run by ``scan``, the last one first."""

    def run(
        gradients: list[Tensor], parts: list[Tensor], weight: Tensor, projection: Tensor | None, cell: str
    ) -> list[Tensor]:
        count = len(gradients)
        step = backward_step(cell, count, projection is not None)
        rest = [x for x in (weight, projection) if x is not None]
        init = [torch.zeros_like(x[0]) for x in gradients]
        results = scan(step, init, [x.flip(0) for x in (*gradients, *parts)], rest)
        return [*results[:count], *(x.flip(0) for x in results[count:])]

    return run


torch.library.impl(_LIBRARY, "recurrence", "CompositeExplicitAutograd")(forward(looped))
torch.library.impl(_LIBRARY, "recurrence_backward", "CompositeExplicitAutograd")(backward(looped))


@torch.library.register_fake("bi_inductor::recurrence", lib=_LIBRARY)
def _recurrence_fake(
    steps: Tensor, states: list[Tensor], weight: Tensor, bias: Any, projection: Any, cell: str
) -> list[Tensor]:
    return [steps.new_empty(steps.shape[0], *state.shape) for state in states]


@torch.library.register_fake("bi_inductor::recurrence_backward", lib=_LIBRARY)
def _recurrence_backward_fake(
    gradients: list[Tensor], parts: list[Tensor], weight: Tensor, projection: Any, cell: str
) -> list[Tensor]:
    of_steps = gradients[0].new_empty(*gradients[0].shape[:2], weight.shape[0])
    emitted = [of_steps] * (2 if cell == "gru" else 1)
    projected = [] if projection is None else [gradients[0]]
    return [
        *(torch.empty_like(x[0]) for x in gradients),
        *(x.new_empty(x.shape) for x in (*emitted, *projected)),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    steps, states, weight, bias, projection, ctx.cell = inputs
    ctx.count = len(states)
    ctx.save_for_backward(steps, weight, bias, projection, *states, *output)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    steps, weight, bias, projection, *rest = ctx.saved_tensors
    first, after = rest[: ctx.count], rest[ctx.count :]
    before = tuple(torch.cat([x.unsqueeze(0), y[:-1]]) for x, y in zip(first, after, strict=True))
    product = hidden_product(before[0].flatten(0, 1), weight, bias).unflatten(0, steps.shape[:2])
    parts = CELLS[ctx.cell].parts(steps, product, before, tuple(after))
    found = recurrence_backward(
        list(gradients), [x.contiguous() for x in parts], weight, projection, ctx.cell
    )
    of_states, (of_steps, *others) = found[: ctx.count], found[ctx.count :]
    of_product = others[0] if ctx.cell == "gru" else of_steps
    of_projection = None
    if projection is not None:
        of_projection = _over_rows_and_steps(others[-1], parts[3] * parts[4])  # o * tanh(c')
    of_bias = None if bias is None else of_product.transpose(0, 1).sum((0, 1))
    return of_steps, of_states, _over_rows_and_steps(of_product, before[0]), of_bias, of_projection, None


def _over_rows_and_steps(left: Tensor, right: Tensor) -> Tensor:
    """``[T, B, M]``, ``[T, B, N]`` -> ``[M, N]``: one product over (B, T)."""
    return torch.mm(left.transpose(0, 1).flatten(0, 1).t(), right.transpose(0, 1).flatten(0, 1))


torch.library.register_autograd("bi_inductor::recurrence", _backward, setup_context=_save, lib=_LIBRARY)
