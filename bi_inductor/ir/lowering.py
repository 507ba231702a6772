"""Triton IR (TTIR, TTGIR) of emitted kernels, in the configurations that may be chosen; made without a GPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any
from unittest import mock

from torch._inductor.runtime.hints import ReductionHint

from ..offline import load_kernel
from ..runtime import schedules
from ..targets import VirtualDevice

#: Tiles follow the number of rows up to here, and are the same beyond.
_MOST_ROWS = 1 << 16


class _Captured(BaseException):
    """Stops Inductor's launcher where it would compile; no Exception, which it would log."""


@dataclasses.dataclass(frozen=True)
class LoweredKernel:
    """One kernel in one configuration: the text of its TTIR, and of TTGIR, in which layouts and instructions have been
    chosen. ``arguments``: names of the function's parameters in the order of the IR, constants left out."""

    name: str
    shown: str
    config: Any
    ttir: str
    ttgir: str
    arguments: tuple[str, ...]


class Lowering:
    """One kernel that ``source`` defines as ``name``, lowered for ``target`` on demand. Used inside ``virtual_gpu``."""

    def __init__(self, source: str, name: str, device: VirtualDevice) -> None:
        self.name, self.device = name, device
        self.autotuner = load_kernel(source, name)
        self.autotuner.device_props = self.autotuner.device_props._replace(cc=device.arch, major=device.major)
        self.inductor_meta = self.autotuner.inductor_meta
        self.configs = self._all_configs()
        self._made: dict[int, LoweredKernel] = {}

    def _all_configs(self) -> list[Any]:
        """The configurations of the heuristic, or every tile that a launch may choose."""
        choice = getattr(
            self.autotuner, "choice", None
        )  # a matrix product with several tiles: runtime/tiles.py
        if choice is not None:
            return list(choice.configs)
        own = list(self.autotuner.configs)
        hints = self.autotuner.size_hints or {}
        kind = str(self.autotuner.heuristic_type).rpartition(".")[2]
        if set(hints) != {"x", "r0_"} or kind not in ("REDUCTION", "PERSISTENT_REDUCTION"):
            return own
        choose = schedules.persistent_tile if kind == "PERSISTENT_REDUCTION" else schedules.looped_tile
        inner = self.inductor_meta.get("reduction_hint") == ReductionHint.INNER
        tiles = {choose(1 << k, hints["r0_"], inner) for k in range(_MOST_ROWS.bit_length())}
        names = [name for name in ("XBLOCK", "R0_BLOCK") if name in own[0].kwargs]
        others = [_changed(own[0], dict(zip(names, tile, strict=False))) for tile in sorted(tiles)]
        return own + [c for c in others if c.kwargs not in [known.kwargs for known in own]]

    def lowered(self, number: int) -> LoweredKernel:
        """The kernel in configuration ``number``, modulo their number. Raises Triton's errors."""
        number %= len(self.configs)
        if number not in self._made:
            config = self.configs[number]
            source, options = _captured(self.autotuner, config)
            self._made[number] = LoweredKernel(
                self.name, str(config), config, *_texts(source, options, self.device), _parameters(source)
            )
        return self._made[number]


def _changed(config: Any, blocks: dict[str, int]) -> Any:
    changed = copy.deepcopy(config)
    changed.kwargs.update(blocks)
    return changed


def _captured(autotuner: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """What Inductor's launcher hands to ``triton.compile`` for one configuration."""
    import triton

    captured: list[Any] = []

    def capture(source: Any, *_: Any, options: Any = None, **__: Any) -> Any:
        captured.append((source, dict(options or {})))
        raise _Captured

    with mock.patch.object(triton, "compile", capture), contextlib.suppress(_Captured):
        autotuner._precompile_config(config)
    return captured[0]


def _texts(source: Any, options: dict[str, Any], device: VirtualDevice) -> tuple[str, str]:
    """TTIR and TTGIR; Gluon has no TTIR."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", device.arch, device.warp_size)
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    metadata = {"target": target, **parsed.__dict__}
    ttir = str(stages["ttir"](module, metadata)) if "ttir" in stages else ""
    return ttir, str(stages["ttgir"](module, metadata))


def _parameters(source: Any) -> tuple[str, ...]:
    return tuple(name for name, kind in source.signature.items() if kind != "constexpr")
