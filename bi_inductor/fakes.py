"""Copies of a function and its arguments whose tensors hold no data, on a device that need not exist."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fake_like(x: Tensor, device: str, *, keep_grad: bool) -> Tensor:
    """An empty tensor on ``device`` with the size, strides, dtype and marks (dynamic dims) of ``x``.

    It requires a gradient if ``x`` does and ``keep_grad`` is true.
    Has to be called under a FakeTensorMode; nothing is allocated.
    """
    fake = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    fake.requires_grad_(keep_grad and x.requires_grad)
    for name, value in vars(x).items():
        if name.startswith("_dynamo_"):
            setattr(fake, name, copy.copy(value))
    return fake


class _FakesInsteadOfCopies(TorchFunctionMode):
    """While active, ``copy.deepcopy`` of a tensor makes a fake on ``device`` and copies no data."""

    def __init__(self, device: str, keep_grad: bool) -> None:
        super().__init__()
        self._device, self._keep_grad = device, keep_grad

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return fake_like(args[0], self._device, keep_grad=self._keep_grad)
        # Parameter.__deepcopy__ is type(self)(self.data.clone(), self.requires_grad).
        if func is torch._C.TensorBase.clone:
            return fake_like(args[0], self._device, keep_grad=False)
        if func == Tensor.requires_grad.__get__ and not self._keep_grad:
            return False
        return func(*args, **(kwargs or {}))


def _copied_function(function: types.FunctionType, memo: dict[Any, Any]) -> types.FunctionType:
    """``function`` over copies of the tensors and modules that it closes over or names as globals.

    Its code object is a copy too: Dynamo keeps what it compiled, and decided, by code object.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            is_torchs = (value.__module__ or "").split(".")[0] == "torch"  # Dynamo knows those by identity
            return _copied_function(value, memo) if value.__closure__ and not is_torchs else value
        return copy.deepcopy(value, memo) if isinstance(value, (Tensor, torch.nn.Module)) else value

    known = memo.get(("function", id(function)))
    if known is not None:
        return known
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    used = {name: value for name, value in names.items() if _holds_tensors(value, function)}
    # One namespace for all functions of a file, as Dynamo expects of functions that it inlines.
    place = ("globals", id(function.__globals__))
    namespace = (
        memo.setdefault(place, {**function.__globals__}) if used else memo.get(place, function.__globals__)
    )
    copied = types.FunctionType(
        function.__code__.replace(), namespace, function.__name__, function.__defaults__, function.__closure__
    )
    memo["function", id(function)] = copied  # it may call itself
    for name, value in used.items():
        namespace[name] = (
            _copied_function(value, memo) if isinstance(value, types.FunctionType) else moved(value)
        )
    closure = tuple(types.CellType(moved(cell.cell_contents)) for cell in function.__closure__ or ())
    if closure:
        copied = types.FunctionType(
            copied.__code__, namespace, function.__name__, function.__defaults__, closure
        )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _holds_tensors(value: Any, caller: types.FunctionType) -> bool:
    """True for what has to be moved among the globals of ``caller``: tensors, modules, functions of its own file."""
    if isinstance(value, types.FunctionType):
        return value.__globals__ is caller.__globals__ and "torch" not in caller.__globals__.get(
            "__name__", ""
        )
    return isinstance(value, (Tensor, torch.nn.Module))


class FakeCall(NamedTuple):
    """A function and its arguments made of fakes; ``originals``: id of a fake -> what it stands for."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    originals: dict[int, Tensor]


def fake_call(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: str, *, keep_grad: bool
) -> FakeCall:
    """``fn(*args, **kwargs)`` with every tensor, also in modules and closures, made a fake on ``device``.

    Shared tensors stay shared. Has to be called under a FakeTensorMode. What was passed is not changed.
    """
    memo: dict[Any, Any] = {}
    with _FakesInsteadOfCopies(device, keep_grad):
        args, kwargs = copy.deepcopy((args, kwargs), memo)
        fn = _copied_function(fn, memo) if isinstance(fn, types.FunctionType) else copy.deepcopy(fn, memo)
    # deepcopy keeps what it copied alive in the memo's entry for the memo itself.
    tensors = [x for x in memo.get(id(memo), ()) if isinstance(x, Tensor)]
    return FakeCall(fn, args, kwargs, {id(memo[id(x)]): x for x in tensors})
