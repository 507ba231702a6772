"""Do all tiles that the backend may choose give the same bits, on the GPU at hand?

That the chain of K steps alone decides the bits of a tensor core's sums is a property of hardware and compiler. It was
measured on an H100; here it is measured where it is relied on. For each kind of product one graph is compiled that
holds it once for every selectable tile and several lengths of K, tails among them; operands are random with wide
exponents, 16-bit results are made to show the fp32 sums behind them, and outputs are compared bit for bit. One class
of bits for each K is what the contract needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bi_inductor.certificate import collected_sources
from bi_inductor.targets import TARGETS
from bi_inductor.templates import quantized_tiles, tile_table
from bi_inductor.templates.tile_table import Tile
from bi_inductor.testing import with_cancellation

#: No multiples of a tile, so that edges are computed too.
ROWS, COLUMNS = 136, 272

#: Instruction in PTX -> what the report calls it. The first that a kernel has is its family.
_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\S*",
    "tcgen05": r"\btcgen05\.mma\S*",
    "mma.sync": r"\bmma\.sync\S*",
    "fma": r"\bfma\.rn\.f(?:32|64)",
}
_PRODUCT = re.compile(r"def \w*_tem_")
_DEPTH = re.compile(r"m\d+n\d+(k\d+)")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of product: its operands, its tiles, and the module whose ``tile_for`` chooses among them."""

    name: str
    dtype: torch.dtype
    depths: tuple[int, ...]
    product: Callable[[Tensor, Tensor], Tensor]
    tiles: Callable[[int], tuple[Tile, ...]]
    template: str = "triton_matmul"
    tf32: bool = False


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.t())


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Both halves of the rows times the same weight, as two groups."""
    ends = torch.arange(1, 3, device=x.device, dtype=torch.int32) * (x.shape[0] // 2)
    return torch._grouped_mm(x, weight.t().expand(2, *weight.t().shape), offs=ends)


def _scaled(fast: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)

    return product


def _table(dtype: torch.dtype, **options: bool) -> Callable[[int], tuple[Tile, ...]]:
    name = str(dtype).removeprefix("torch.")
    return lambda capability: tile_table.candidates(name, capability, **options)


def _quantized(kind: str) -> Callable[[int], tuple[Tile, ...]]:
    return lambda capability: quantized_tiles.candidates(kind, capability)


def _chain(name: str, dtype: torch.dtype, *depths: int, **options: bool) -> Kind:
    return Kind(name, dtype, depths, _linear, _table(dtype, **options), tf32=options.get("tf32", False))


KINDS = (
    _chain("bfloat16", torch.bfloat16, 72, 1000, 4096, tma=True, wide=True),
    _chain("bfloat16-unaligned", torch.bfloat16, 31, 1001, aligned=False),
    _chain("float16", torch.float16, 72, 1000, 4096, tma=True, wide=True),
    _chain("tf32", torch.float32, 36, 1000, 2048, tf32=True),
    _chain("float32", torch.float32, 36, 1000),
    _chain("float64", torch.float64, 34, 1000),
    Kind(
        "bfloat16-grouped",
        torch.bfloat16,
        (72, 1000),
        _grouped,
        _table(torch.bfloat16),
        "triton_grouped",
    ),
    Kind("int8", torch.int8, (48, 1008), _int_mm, _quantized("int8"), "triton_quantized"),
    Kind(
        "float8_e4m3fn",
        torch.float8_e4m3fn,
        (48, 1008, 4096),
        _scaled(False),
        _quantized("fp8 in chunks"),
        "triton_quantized",
    ),
    Kind(
        "float8_e4m3fn-fast",
        torch.float8_e4m3fn,
        (48, 1008, 4096),
        _scaled(True),
        _quantized("fp8"),
        "triton_quantized",
    ),
    Kind(
        "float8_e5m2",
        torch.float8_e5m2,
        (48, 1008),
        _scaled(False),
        _quantized("fp8 in chunks"),
        "triton_quantized",
    ),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How many classes of bits the tiles of one kind gave; a family's own row has its name in ``family``.

    ``shapes``: the tiles, as ``Tile.key``.
    """

    kind: str
    family: str
    tiles: int
    depths: tuple[int, ...]
    classes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def agrees(self) -> bool:
        return max(self.classes) == 1


def is_supported(kind: Kind, capability: int) -> bool:
    """False for fp8 where the backend refuses it."""
    from bi_inductor.templates.mma_family import fp8_family

    return kind.dtype.itemsize > 1 or kind.dtype == torch.int8 or fp8_family(capability) is not None


def examine(
    kind: Kind,
    tiles: Sequence[Tile] | None = None,
    *,
    device: str = "cuda",
    execute: Callable[..., list[list[Tensor]]] | None = None,
) -> list[Result]:
    """Run ``kind`` with every tile (by default: all that may be chosen on this GPU) and count classes of bits.

    ``execute(graph, *inputs)``: how a graph is run, by default compiled for the GPU. Returns one Result over all
    tiles, then one for each family of instructions if there are several.
    """
    if tiles is None:
        major, minor = torch.cuda.get_device_capability()
        tiles = tuple(dict.fromkeys(kind.tiles(10 * major + minor)))
    pairs = [operands(kind.dtype, depth, device) for depth in kind.depths]
    outputs, families = _run(kind, tiles, pairs, execute or on_the_gpu)
    return summarise(kind, [[digest(x) for x in row] for row in outputs], families, tiles)


def summarise(
    kind: Kind, digests: Sequence[Sequence[str]], families: Sequence[str], tiles: Sequence[Tile] = ()
) -> list[Result]:
    """``digests[i][j]``: of the output for the i-th K with the j-th tile; ``families[j]``: of that tile."""

    def result(name: str, chosen: Sequence[int]) -> Result:
        classes = tuple(len({row[j] for j in chosen}) for row in digests)
        shapes = tuple(tiles[j].key for j in chosen) if tiles else ()
        return Result(kind.name, name, len(chosen), kind.depths, classes, shapes)

    names = list(dict.fromkeys(families))
    whole = result(" + ".join(names), range(len(families)))
    if len(names) == 1:
        return [whole]
    return [
        whole,
        *(result(name, [j for j, family in enumerate(families) if family == name]) for name in names),
    ]


def operands(dtype: torch.dtype, depth: int, device: str) -> tuple[Tensor, Tensor]:
    """x [ROWS, K] and weight [COLUMNS, K]: both signs, exponents over 16 binades (8 for fp16 and 8-bit floats).

    K is ``depth``, and 2 * COLUMNS more for 16-bit floats: the terms of :func:`with_cancellation`.
    """
    generator = torch.Generator().manual_seed(depth)

    def random(rows: int) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-128, 128, (rows, depth), generator=generator, dtype=dtype)
        spread = 4 if dtype == torch.float16 or dtype.itemsize == 1 else 8
        exponents = torch.randint(-spread, spread, (rows, depth), generator=generator)
        values = torch.randn(rows, depth, generator=generator, dtype=torch.float64).clamp(-3, 3)
        return (values * torch.exp2(exponents.double())).to(dtype)

    pair = random(ROWS), random(COLUMNS)
    x, weight = with_cancellation(*pair) if dtype.itemsize == 2 else pair
    return x.to(device), weight.to(device)


def digest(x: Tensor) -> str:
    """Of the bits of ``x``."""
    return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _run(
    kind: Kind,
    tiles: Sequence[Tile],
    pairs: Sequence[tuple[Tensor, Tensor]],
    execute: Callable[..., list[list[Tensor]]],
) -> tuple[list[list[Tensor]], list[str]]:
    """Outputs by K and tile, and the family of each tile, from one compiled graph."""

    def graph(inputs: list[list[Tensor]], weights: list[Tensor]) -> list[list[Tensor]]:
        return [[kind.product(x, weight) for x in row] for row, weight in zip(inputs, weights, strict=True)]

    # Copies, so that no two products of the graph are the same expression.
    inputs = [[x.clone() for _ in tiles] for x, _ in pairs]
    weights = [weight for _, weight in pairs]
    with prepared(kind.template, "tile_for", [*tiles] * len(pairs), tf32=kind.tf32) as sources:
        outputs = execute(graph, inputs, weights)
    families = [family for source in sources for family in instructions(source, len(tiles))]
    return outputs, (families or ["unknown"] * len(tiles))[: len(tiles)]


def on_the_gpu(graph: Callable[..., Any], *inputs: Any) -> list[list[Any]]:
    """The results of ``graph``, compiled for these inputs."""
    return torch.compile(graph, backend="batchinv", dynamic=False)(*inputs)


@contextlib.contextmanager
def prepared(template: str, chooser: str, chosen: Sequence[Any], *, tf32: bool) -> Iterator[list[str]]:
    """Everything set for compiling and running a graph: :func:`chosen_in_turn`, tf32 allowed or not, no gradients.

    Yields a list of the generated modules that were compiled so far, as text.
    """
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(chosen_in_turn(template, chooser, chosen))
        stack.enter_context(_tf32(tf32))
        stack.enter_context(torch.no_grad())
        yield stack.enter_context(collected_sources())


@contextlib.contextmanager
def chosen_in_turn(template: str, chooser: str, chosen: Sequence[Any]) -> Iterator[None]:
    """The ops of a graph get these tiles or schedules, in the order in which they are lowered; nothing is cached.

    ``chooser``: the function of the module ``template`` that chooses otherwise.
    """
    import importlib

    module: ModuleType = importlib.import_module(f"bi_inductor.templates.{template}")
    stock, remaining = getattr(module, chooser), iter(chosen)
    setattr(module, chooser, lambda *args, **options: next(remaining))
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
    finally:
        setattr(module, chooser, stock)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def instructions(
    source: str,
    count: int,
    target: str | None = None,
    *,
    pattern: re.Pattern[str] = _PRODUCT,
    step: int = 1,
) -> list[str]:
    """What multiplies in every ``step``-th of the first ``count`` products of a generated module, in its order.

    ``target``: an architecture of ``targets.TARGETS``, by default this GPU's. "unknown" for one that is not there.
    ``pattern``: what is found in the source of a product's kernel.
    """
    from bi_inductor.inspection import kernel_definitions
    from bi_inductor.offline import compile_offline

    if target is None:
        major, minor = torch.cuda.get_device_capability()
        target = f"sm_{major}{minor}"
    products = [(name, text) for name, text in kernel_definitions(source).items() if pattern.search(text)]
    chosen = products[:count:step]
    if target not in TARGETS:
        return ["unknown"] * len(chosen)
    try:
        return [_family(kernel.ptx) for kernel in compile_offline(dict(chosen), target)]
    except Exception:  # a name for the report, which must not cost it
        return ["unknown"] * len(chosen)


def _family(ptx: str) -> str:
    """The kind of multiply-add in ``ptx``, with the products that a step of it adds up."""
    for name, pattern in _INSTRUCTIONS.items():
        found = re.search(pattern, ptx)
        if found:
            depth = _DEPTH.search(found[0])
            return f"{name} {depth[1]}" if depth else name
    return "unknown"
