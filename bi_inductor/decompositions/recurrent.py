"""Recurrent layers as ``scan``: Inductor makes a loop of it, whose body is compiled once for any number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bi_inductor.recurrence import backward, forward, recurrence, recurrence_backward


def _scan(
    step: Callable[..., list[Tensor]], init: Sequence[Tensor], xs: Sequence[Tensor], rest: Sequence[Tensor]
) -> Any:
    """Symbolic sizes go along as arguments of the body: Inductor allocates its outputs by these."""
    from torch._guards import detect_fake_mode
    from torch._higher_order_ops.scan import scan_op

    fake_mode: Any = detect_fake_mode(xs)
    fake_mode.allow_scalar_outputs = True  # the loop that Inductor makes of a scan reads its counter
    sizes = [size for x in xs for size in x.shape[1:] if isinstance(size, torch.SymInt)]
    symbols = {symbol: size.node.shape_env for size in sizes for symbol in size.node.expr.free_symbols}
    bound = [environment.create_symintnode(symbol, hint=None) for symbol, environment in symbols.items()]

    def without_sizes(*given: Any) -> list[Tensor]:
        return step(*given[: len(given) - len(bound)])

    return scan_op(without_sizes, [x.contiguous() for x in init], list(xs), (*rest, *bound))


TABLE: dict[Any, Callable[..., Any]] = {recurrence: forward(_scan), recurrence_backward: backward(_scan)}
