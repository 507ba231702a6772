"""At run time: the backward reads ``parameter.grad`` when it begins, and its result takes that place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Packed = tuple[Tensor, int]


class _Start:
    """What is saved for a backward in place of a gradient that is not known yet."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def read(self) -> Tensor:
        """The gradient to go on from. Raises RuntimeError where it could not be replaced by the result."""
        parameter, task = self.parameter, torch._C._current_graph_task_id()
        if _reading.get(parameter) == task:
            raise RuntimeError(
                "batchinv.continue_gradients: a parameter is reached twice in one backward, so two sums would go on "
                "from one gradient. Call backward for each output, or compile both uses as one function."
            )
        _reading[parameter] = task
        _expect_accumulation(parameter)
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


#: Parameter -> the backward in which a compiled graph read its gradient last.
_reading = WeakTensorKeyDictionary()
#: Parameters with the hook of ``_replace_gradient``.
_hooked = WeakTensorKeyDictionary()


def _expect_accumulation(parameter: Tensor) -> None:
    """Only where autograd is about to set ``.grad`` is a total, not this backward's part alone, the right answer."""
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad
        accumulates = False
    if not accumulates:
        raise RuntimeError(
            "batchinv.continue_gradients: gradients of parameters go on from parameter.grad, so they can be had by "
            "backward() only, not by torch.autograd.grad"
        )


def _replace_gradient(parameter: Tensor) -> None:
    """Before autograd adds a total to ``.grad``: the total holds what was there."""
    if parameter in _hooked:
        return
    _hooked[parameter] = True
    reference = weakref.ref(parameter)

    def hook(gradient: Tensor) -> None:
        parameter = reference()
        if parameter is not None and _reading.get(parameter) == torch._C._current_graph_task_id():
            parameter.grad = None

    parameter.register_hook(hook)


def with_gradients_continued(compiled: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
    """``compiled``, which takes the starts of its parameters' gradients as last arguments, without them.

    ``positions``: where the parameters stand among the arguments.
    """

    def run(*arguments: Any) -> Any:
        parameters = [arguments[position] for position in positions]
        if not torch.is_grad_enabled():
            return compiled(*arguments, *parameters)
        starts = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]
        owners = dict(zip(map(_storage, starts), parameters, strict=True))

        def pack(x: Tensor) -> _Packed | _Start:
            owner = owners.get(_storage(x))
            return (x.detach(), x._version) if owner is None else _Start(owner)

        for parameter in parameters:
            _replace_gradient(parameter)
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return compiled(*arguments, *starts)

    return run


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _unpack(packed: _Packed | _Start) -> Tensor:
    if isinstance(packed, _Start):
        return packed.read()
    x, version = packed
    if x._version != version:
        raise RuntimeError("a tensor that the backward needs was changed in place after the forward")
    return x
