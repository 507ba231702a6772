"""``score_mod`` as text: the elementwise ops of a function of one score and its place, and of its derivative.

An op of a graph can have a text for an argument, and not a function. A program is JSON: a list of [op, arguments, named
arguments], then the number of its result. ``{"v": n}`` is value n: first the inputs, then the results, one by one.

    forward     score, b, h, i, j, captured ...           -> the score that the softmax sees
    derivative  score, b, h, i, j, gradient, captured ... -> the gradient of the score that the product gave

Values are tensors of one element when a program is made. It may be run on tensors that broadcast to [B, H, L, S], or by
lowerings that compute an element where a kernel needs it: ops with an axis are not in programs. A division by a number
is a product with its reciprocal, as eager PyTorch has it on a GPU: one that rounds correctly calls a function for rare
cases, and took a third of the instructions of a soft-cap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

#: Inputs before the captured tensors: score, b, h, i, j; a derivative has the gradient after them.
PLACES = 5
_aten = torch.ops.aten
#: Elementwise without being pointwise ops of PyTorch's: a look-up by computed indices, and constants.
_MORE = frozenset({_aten.index.Tensor, _aten.full.default, _aten.scalar_tensor.default})
#: The same value.
_SAME = frozenset(
    {_aten.alias.default, _aten.detach.default, _aten.clone.default, _aten.lift_fresh_copy.default}
)


def programs_of(score_mod: GraphModule, query: Tensor, captured: Sequence[Any]) -> tuple[str, str] | None:
    """(forward, derivative) of ``score_mod(score, b, h, i, j, *captured)``; None if it is no such program.

    It is none if an op is not elementwise, or if a captured tensor has fewer bits than ``query``'s elements, or is a
    single fp64 number, which would widen the dtype of single scores and not of many.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.fx.experimental.proxy_tensor import make_fx

    from .decompositions import decompositions

    if not all(isinstance(x, Tensor) and _may_be_captured(x, query) for x in captured):
        return None
    mode = query.fake_mode  # type: ignore[attr-defined]
    with mode:  # on the CPU, where autograd needs no GPU; a program names no device
        score, gradient = (torch.empty((), dtype=torch.float32) for _ in range(2))
        places = [torch.empty((), dtype=torch.int64) for _ in range(PLACES - 1)]
        detached = [torch.empty_like(x, device="cpu", requires_grad=False) for x in captured]

    def derivative(
        score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, grad: Tensor, *rest: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            leaf = score.detach().requires_grad_()
            result = _first(score_mod(leaf, b, h, i, j, *rest)).to(score.dtype)
            if not result.requires_grad:
                return torch.zeros_like(score)
            (found,) = torch.autograd.grad(result, leaf, grad)
        return found

    def forward(*values: Tensor) -> Tensor:
        return _first(score_mod(*values)).to(score.dtype)

    found = []
    for function, inputs in ((forward, [score, *places]), (derivative, [score, *places, gradient])):
        try:
            with mode, TransformGetItemToIndex():
                program = _text(make_fx(function, decompositions())(*inputs, *detached))
        except (
            RuntimeError
        ):  # a tensor of its own on a GPU; or an error that the function shall raise where it is used
            return None
        if program is None:
            return None
        found.append(program)
    return found[0], found[1]


def run(program: str, inputs: Sequence[Any], call: Callable[..., Any] | None = None) -> Any:
    """The result of ``program``. ``call(op, args, kwargs)`` runs or lowers one op."""
    *steps, result = json.loads(program)
    values = list(inputs)
    for name, arguments, options in steps:
        op = _op(name)
        args, kwargs = (
            tree_map(lambda x: _decoded(x, values), x, is_leaf=_is_encoded) for x in (arguments, options)
        )
        values.append(_called(op, args, kwargs) if call is None else call(op, tuple(args), kwargs))
    return values[result]


def _called(op: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """``op`` with numbers where it takes tensors, as decompositions leave them."""
    wanted = [str(argument.type) for argument in op._schema.arguments]
    tensors = [
        torch.tensor(x) if kind == "Tensor" and not isinstance(x, Tensor) else x
        for x, kind in zip(args, wanted, strict=False)
    ]
    return op(*tensors, **kwargs)  # type: ignore[no-any-return]


def run_on_grid(program: str, scores: Tensor, extra: Sequence[Tensor], captured: Sequence[Tensor]) -> Tensor:
    """``program`` for all ``scores [B, H, L, S]``; ``extra``: the gradient, of the same shape, for a derivative."""
    places = [
        torch.arange(size, device=scores.device).reshape([-1 if dim == other else 1 for other in range(4)])
        for dim, size in enumerate(scores.shape)
    ]
    return run(program, [scores, *places, *extra, *captured]).expand(scores.shape)  # type: ignore[no-any-return]


def _may_be_captured(x: Tensor, query: Tensor) -> bool:
    widens = x.dim() == 0 and x.dtype == torch.float64
    return x.device == query.device and x.itemsize >= query.itemsize and x.dtype != torch.bool and not widens


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _is_elementwise(op: Any) -> bool:
    from .verdicts import is_pointwise

    return isinstance(op, torch._ops.OpOverload) and op.namespace in ("aten", "prims") and (
        op in _MORE or is_pointwise(op)
    )  # fmt: skip


def _op(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not _is_elementwise(op):
        raise ValueError(f"{name} is no elementwise op")
    return op


def _text(gm: GraphModule) -> str | None:
    """The program of ``gm``'s graph, or None if it has more than elementwise ops on single elements."""
    numbers: dict[Node, int] = {}
    count = 0
    steps: list[Any] = []
    gm.graph.eliminate_dead_code()
    for node in gm.graph.nodes:
        if node.op == "output":
            result = numbers.get(_first(node.args[0]))  # type: ignore[arg-type]
            return None if result is None else json.dumps([*steps, result], separators=(",", ":"))
        if node.target in _SAME:
            numbers[node] = numbers[node.args[0]]  # type: ignore[index]
            continue
        if node.op == "call_function":
            value = node.meta.get("val")
            if not _is_elementwise(node.target) or not isinstance(value, Tensor) or value.dim() != 0:
                return None
            try:
                arguments, options = (
                    tree_map(lambda x: _encoded(x, numbers), x) for x in (list(node.args), dict(node.kwargs))
                )
            except (KeyError, TypeError):
                return None
            steps.append(_step(str(node.target), arguments, options, value.dtype))
        elif node.op != "placeholder":
            return None
        numbers[node] = count
        count += 1
    return None


def _step(op: str, arguments: list[Any], options: dict[str, Any], dtype: torch.dtype) -> list[Any]:
    """A step of a program; a division of fp32 by a number is a product with its reciprocal."""
    divisor = arguments[1] if op == "aten.div.Tensor" and not options else None
    if isinstance(divisor, (int, float)) and dtype == torch.float32 and 1e-30 < abs(divisor) < 1e30:
        return ["aten.mul.Tensor", [arguments[0], 1.0 / divisor], options]
    return [op, arguments, options]


def _encoded(x: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(x, Node):
        return {"v": numbers[x]}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, torch.device):
        return {"device": 0}
    if isinstance(x, (torch.layout, torch.memory_format)):
        return None
    raise TypeError(type(x).__name__)


def _is_encoded(x: Any) -> bool:
    return isinstance(x, dict) and set(x) in ({"v"}, {"dtype"}, {"device"})


def _decoded(x: Any, values: Sequence[Any]) -> Any:
    if not _is_encoded(x):
        return x
    if "v" in x:
        return values[x["v"]]
    return getattr(torch, x["dtype"]) if "dtype" in x else _device_of(values[x["device"]])


def _device_of(x: Any) -> Any:
    return x.device if isinstance(x, Tensor) else x.get_device()
