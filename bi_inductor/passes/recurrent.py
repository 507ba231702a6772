"""``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells, as products of all inputs and a ``recurrence``.

Stock Dynamo leaves the layers to eager code, where a library (oneDNN, cuDNN) adds in an order of its own. Here::

    a_t = round(sum_k x[t, k] * w_ih[n, k] + b_ih[n])       one product for all steps
    u_t = round(sum_k h[k] * w_hh[n, k] + b_hh[n])          step by step, see ``bi_inductor/recurrence.py``

A row of the batch is a row of every product, and a step knows nothing of the steps after it: neither the batch nor
what follows in a longer sequence can change its bits. A cell called in a loop computes the bits of the layer. Dropout
between layers draws by (row, step, feature), so that a row's numbers depend on its slot and not on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.graph_breaks import PADDING
from bi_inductor.ops import composite
from bi_inductor.passes.attention import autocast_applied
from bi_inductor.passes.linear import linear
from bi_inductor.passes.retarget import Retarget
from bi_inductor.recurrence import CELLS, recurrence

aten = torch.ops.aten


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


def _weights(parameters: Sequence[Tensor], has_biases: bool, projected: bool) -> Iterator[_Weights]:
    """``parameters`` in torch's order: (w_ih, w_hh, b_ih, b_hh, w_hr) for each layer and direction."""
    count = 2 + 2 * has_biases + projected
    for first in range(0, len(parameters), count):
        given: list[Tensor | None] = list(parameters[first : first + count])
        projection = given.pop() if projected else None
        hidden_bias, input_bias = (given.pop(), given.pop()) if has_biases else (None, None)
        w_ih, w_hh = parameters[first : first + 2]
        yield _Weights(w_ih, w_hh, input_bias, hidden_bias, projection)


def _one_layer(
    cell: str, x: Tensor, states: Sequence[Tensor], weights: _Weights, reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """One direction: ``x [B, T, I]``, states ``[B, S]`` -> outputs ``[B, T, S]``, last states ``[1, B, S]``."""
    steps = linear(x, weights.input, weights.input_bias).transpose(0, 1)
    steps = steps.flip(0) if reverse else steps
    after = recurrence(steps, states, weights.hidden, weights.hidden_bias, weights.projection, cell)
    outputs = after[0].flip(0) if reverse else after[0]
    return outputs.transpose(0, 1), [state[-1:] for state in after]


def _layers(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """``input [T, B, I]`` (``[B, T, I]`` with ``batch_first``), each of ``states`` ``[layers * directions, B, S]``.

    Returns the outputs ``[T, B, directions * S]`` and the last states, shaped like ``states``.
    """
    directions = 2 if bidirectional else 1
    projected = len(parameters) == num_layers * directions * (3 + 2 * has_biases)
    weights = _weights(parameters, has_biases, projected)
    x = input if batch_first else input.transpose(0, 1)
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            initial = [state[layer * directions + direction] for state in states]
            output, final = _one_layer(cell, x, initial, next(weights), reverse=direction == 1)
            outputs.append(output)
            last.append(final)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if train and dropout and layer < num_layers - 1:
            x = torch.dropout(x, dropout, train)
    finals = (torch.cat(state) for state in zip(*last, strict=True))
    return x if batch_first else x.transpose(0, 1), *finals


_LAYER = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, "
    "bool batch_first"
)
_CELL = "Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, Tensor? b_hh=None"


@composite(f"lstm(Tensor input, Tensor[] hx, {_LAYER}) -> (Tensor, Tensor, Tensor)")
def lstm(input: Tensor, hx: list[Tensor], params: list[Tensor], *settings: Any) -> tuple[Tensor, ...]:
    """Arguments and results of ``torch.lstm`` on padded sequences."""
    with autocast_applied(input, *hx, *params) as (input, *rest):
        return _layers("lstm", input, rest[: len(hx)], rest[len(hx) :], *settings)


def _single_state(cell: str) -> torch._ops.OpOverload:
    """``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu`` on padded sequences."""

    def layers(input: Tensor, hx: Tensor, params: list[Tensor], *settings: Any) -> tuple[Tensor, ...]:
        with autocast_applied(input, hx, *params) as (input, hx, *params):
            return _layers(cell, input, (hx,), params, *settings)

    return composite(f"{cell}(Tensor input, Tensor hx, {_LAYER}) -> (Tensor, Tensor)")(layers)


def _step(cell: str, x: Tensor, states: Sequence[Tensor], *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """One step: ``x [B, I]`` and states ``[B, S]``, or both without B."""
    with autocast_applied(x, *states, *parameters) as (x, *rest):
        states, (w_ih, w_hh, b_ih, b_hh) = tuple(rest[: len(states)]), rest[len(states) :]
        return CELLS[cell].update(linear(x, w_ih, b_ih), linear(states[0], w_hh, b_hh), states)


@composite(f"lstm_cell(Tensor input, Tensor[] hx, {_CELL}) -> (Tensor, Tensor)")
def lstm_cell(
    input: Tensor,
    hx: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Arguments and results of ``torch.lstm_cell``."""
    return _step("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)


def _single_state_cell(cell: str) -> torch._ops.OpOverload:
    """``torch.gru_cell``, ``torch.rnn_tanh_cell`` or ``torch.rnn_relu_cell``."""

    def step(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return _step(cell, input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]

    return composite(f"{cell}_cell(Tensor input, Tensor hx, {_CELL}) -> Tensor")(step)


_PACKED = (aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)


def _packed_refusal(node: Node) -> BatchInvarianceError | None:
    """Packed sequences come with the batch size of every step behind the data."""
    place = (
        1 if node.target is torch.lstm else 2
    )  # of the first list: the states of an LSTM, parameters otherwise
    by_name = "batch_sizes" in node.kwargs or node.target in _PACKED
    if not by_name and (len(node.args) <= place or isinstance(node.args[place], (list, tuple))):
        return None
    name = getattr(node.target, "__name__", str(node.target))
    reason = "how many rows each step has only the data knows"
    return BatchInvarianceError(f"{name} of a PackedSequence", reason, PADDING, source_line(node))


def _rewrite(name: str, replacement: torch._ops.OpOverload) -> Retarget:
    packet = getattr(aten, name)
    overloads = {getattr(packet, overload) for overload in packet.overloads()}
    targets = frozenset({getattr(torch, name), *overloads})
    if name.endswith("_cell"):
        return Retarget(name, targets, replacement)
    return Retarget(name, targets, replacement, refuse=_packed_refusal)


_SINGLE_STATE = ("gru", "rnn_tanh", "rnn_relu")
RECURRENT = (
    _rewrite("lstm", lstm),
    _rewrite("lstm_cell", lstm_cell),
    *(_rewrite(name, _single_state(name)) for name in _SINGLE_STATE),
    *(_rewrite(f"{name}_cell", _single_state_cell(name)) for name in _SINGLE_STATE),
)
"""Recurrent layers and cells become steps of products and pointwise ops."""
