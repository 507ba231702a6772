"""Kernels that hold several tiles of one matrix product and choose among them at each launch.

An emitted kernel has its tile's sizes as constant parameters. Where a grid would be, it is launched with the sizes of
its output, so that the grid is a matter of the tile that is launched. All tiles compute the same bits, so which one
runs when is a question of speed alone, as is when it is compiled: the one for the sizes that the graph was compiled
with at once, any other when a launch first asks for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import Config

from ..templates.tile_table import candidates, fastest, itemsize_of
from .checked import CheckedKernel

#: Launch arguments in the place of a grid: the sizes of the output.
SIZES = ("_rows", "_columns", "_batch")
#: Choices that a kernel remembers; more would only take memory.
_MOST_CHOICES = 4096
#: Tiles that ``mode="max-autotune"`` measures.
_MEASURED = 4


def __getattr__(name: str) -> Any:
    return getattr(triton_heuristics, name)


def template(
    num_stages: int,
    num_warps: int,
    triton_meta: dict[str, Any],
    inductor_meta: dict[str, Any],
    filename: str | None = None,
    **_: Any,
) -> Any:
    """Decorator of emitted matrix products, in the place of ``triton_heuristics.template``.

    triton_meta["tiles"]: constants, warps and stages of each tile, first the one to compile at once.
    triton_meta["choice"]: what the choice depends on beside the sizes of the output; see ``TileChoice``.
    """
    configs = [_config(tile) for tile in triton_meta.pop("tiles")]
    choice = TileChoice(configs, **triton_meta.pop("choice"))
    triton_meta["signature"].update(dict.fromkeys(configs[0].kwargs, "constexpr"))
    inductor_meta |= {
        "profile_bandwidth": None,  # it would take another class of kernels
        "grid_type": "PrecomputedGrid",
        "precomputed_grids": [_grid(config, choice.sm_count) for config in configs],
        "extra_launcher_args": list(SIZES),
    }
    return triton_heuristics.cached_autotune(
        None,
        configs[:1],
        triton_meta=triton_meta,
        inductor_meta=inductor_meta,
        heuristic_type=HeuristicType.TEMPLATE,
        filename=filename,
        caching_autotuner_cls=functools.partial(TileChoosing, choice=choice),
    )


def _config(tile: dict[str, Any]) -> Config:
    constants = {name: value for name, value in tile.items() if name not in ("num_warps", "num_stages")}
    return Config(constants, num_warps=tile["num_warps"], num_stages=tile["num_stages"])


def _grid(config: Config, sm_count: int) -> dict[str, Any]:
    """One program per tile of the output; with TMA no more than one per SM."""
    tile = config.kwargs
    rows, columns = f"-(-_rows // {tile['BLOCK_M']})", f"-(-_columns // {tile['BLOCK_N'] + tile['EXTRA_N']})"
    programs = f"_batch * {rows} * {columns}"
    return {"config": tile, "python": (f"min({sm_count}, {programs})" if tile["TMA"] else programs, "1", "1")}


class TileChoice:
    """Which of ``configs`` runs for which sizes: those of ``tile_table.py`` with the least estimated times.

    k: the inner dimension, or the hint for it. The rest is as for ``tile_table.candidates``.
    """

    def __init__(
        self, configs: list[Config], k: int, dtype: str, capability: int, sm_count: int, **how: bool
    ):
        self.configs, self.sm_count = configs, sm_count
        self._k, self._itemsize = k, itemsize_of(dtype)
        self._tiles = candidates(dtype, capability, **how) if len(configs) > 1 else ()
        self._numbers = {_key(config): number for number, config in enumerate(configs)}

    def __call__(self, rows: int, columns: int, batch: int, count: int = 1) -> list[int]:
        """Positions in ``configs`` of the ``count`` best tiles for these sizes, best first."""
        if len(self.configs) == 1:
            return [0]
        tiles = fastest(count, self._tiles, rows, columns, self._k, self._itemsize, self.sm_count, batch)
        return [self._numbers[tile.key] for tile in tiles]


def _key(config: Config) -> tuple[Any, ...]:
    """What ``Tile.key`` is for the tile behind ``config``."""
    names = ("BLOCK_M", "BLOCK_N", "EXTRA_N", "BLOCK_K", "GROUP_M", "SWAP", "TMA")
    return (*(config.kwargs[name] for name in names), config.num_warps, config.num_stages)


class TileChoosing(CheckedKernel):
    """A kernel with the first tile of ``choice``, and one like it for each further tile that a launch has asked for.

    The price of choosing is one look-up by sizes, a fraction of a microsecond.
    """

    def __init__(self, *args: Any, choice: TileChoice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choice = choice
        self._forget()

    def _forget(self) -> None:
        self._by_sizes: dict[
            tuple[int, ...], Any
        ] = {}  # sizes -> run of the kernel with the tile chosen for them
        self._by_tile: dict[int, CheckedKernel] = {}
        self._by_measurement: dict[tuple[int, ...], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_by_sizes": {}, "_by_tile": {}, "_by_measurement": {}}

    def run(self, *args: Any, stream: Any, **kwargs: Any) -> Any:
        """Launch with ``args``, of which the last are the sizes of the output."""
        launch = self._by_sizes.get(args[-3:])
        if launch is None:
            launch = self._choose(args)
        return launch(*args, stream=stream, **kwargs)

    def _choose(self, args: tuple[Any, ...]) -> Any:
        sizes = args[-3:]
        if len(self._by_sizes) >= _MOST_CHOICES:
            self._by_sizes.clear()
        number = self._measured(args) if self.inductor_meta.get("max_autotune") else self.choice(*sizes)[0]
        if number == 0:
            launch = super().run
        elif number not in self._by_tile and torch.cuda.is_current_stream_capturing():
            return (
                super().run
            )  # nothing is loaded while a CUDA graph is captured: a tile that is there, this once
        else:
            launch = self._kernel(number).run
        self._by_sizes[sizes] = launch
        return launch

    def _kernel(self, number: int) -> CheckedKernel:
        """A kernel with tile ``number`` alone, compiled."""
        if number not in self._by_tile:
            if self.fn.fn is None:  # compiled in another process, which kept the source
                self.fn: Any = self._reload_kernel().fn
            kernel = CheckedKernel(
                self.fn,
                triton_meta={**self.triton_meta, "device": self.device_props},
                configs=[self.choice.configs[number]],
                save_cache_hook=None,
                mutated_arg_names=self.mutated_arg_names,
                optimize_mem=self.optimize_mem,
                heuristic_type=self.heuristic_type,
                inductor_meta=self.inductor_meta,
                filename=self.filename,
            )
            kernel.set_compile_info(self.compile_id, self.is_backward)
            kernel.precompile()
            self._by_tile[number] = kernel
        return self._by_tile[number]

    def _measured(self, args: tuple[Any, ...]) -> int:
        """The tile that was fastest for about this many rows: one measurement up to each power of two."""
        rows, columns, batch = args[-3:]
        numbers = self.choice(rows, columns, batch, _MEASURED)
        if len(numbers) == 1 or torch.cuda.is_current_stream_capturing():
            return numbers[0]
        about = ((rows - 1).bit_length(), columns, (batch - 1).bit_length())
        if about not in self._by_measurement:
            self._by_measurement[about] = self._fastest(numbers, args)
        return self._by_measurement[about]

    def _fastest(self, numbers: list[int], args: tuple[Any, ...]) -> int:
        """Which of the tiles ``numbers`` is fastest on copies of ``args``."""
        copies = [_copy(arg) for arg in args]

        def milliseconds(number: int) -> float:
            kernel = self._kernel(number)
            return kernel.bench(kernel.launchers[0], *copies)

        return min(numbers, key=milliseconds)


def _copy(arg: Any) -> Any:
    """A tensor with the strides of ``arg`` and memory of its own: a kernel may update its arguments."""
    if not isinstance(arg, torch.Tensor) or not arg.numel():
        return arg
    extent = 1 + sum((length - 1) * stride for length, stride in zip(arg.shape, arg.stride(), strict=True))
    return arg.new_empty(extent).as_strided(arg.shape, arg.stride()).copy_(arg)
