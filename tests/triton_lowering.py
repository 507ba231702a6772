"""Lower a function of matrix products for a virtual GPU with nothing but our template installed.

The products of the function go straight to ``chain_matmul``, so these tests depend on no other part of the
backend. Everything is fake; what comes back is source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bi_inductor.templates import triton_matmul
from bi_inductor.templates.tile_table import Tile
from bi_inductor.virtual import virtual_gpu

aten = torch.ops.aten


def _product(a: Any, b: Any) -> Any:
    return triton_matmul.chain_matmul(a, b, out_dtype=a.get_dtype())


def _product_and_bias(bias: Any, a: Any, b: Any, *, alpha: float = 1, beta: float = 1) -> Any:
    dtype = a.get_dtype()
    return triton_matmul.chain_matmul(a, b, bias=bias, alpha=alpha, beta=beta, out_dtype=dtype)


LOWERINGS = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_and_bias,
    aten.baddbmm.default: _product_and_bias,
}


@contextmanager
def forced_tile(tile: Tile | None) -> Iterator[None]:
    """Every product lowered meanwhile runs with ``tile``; with the table's if it is None."""
    if tile is None:
        yield
        return
    with mock.patch.object(triton_matmul, "tile_for", lambda *args, **kwargs: tile):
        yield


def _with_dynamic_sizes(x: Tensor, dims: Sequence[int], symbols: dict[int, Any], shape_env: Any) -> Tensor:
    """A fake of x in which ``dims`` are symbols, one symbol per distinct length."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    def symbol(length: int) -> Any:
        source = ConstantSource(f"length_{length}")
        made = shape_env.create_symbol(length, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        return shape_env.create_symintnode(made, hint=length, source=source)

    size: list[Any] = list(x.shape)
    for dim in dims:
        length = x.shape[dim]
        symbols[length] = symbols[length] if length in symbols else symbol(length)
        size[dim] = symbols[length]
    return torch.empty(size, dtype=x.dtype, device="cuda")


def lower(
    fn: Callable[..., Tensor],
    *inputs: Tensor,
    target: str = "sm_90",
    tile: Tile | None = None,
    dynamic: dict[int, Sequence[int]] | None = None,
    **patches: Any,
) -> str:
    """The module that Inductor generates for ``fn`` of fakes of ``inputs`` on ``target``.

    dynamic: input number -> its dynamic dims (such an input is dense). patches: Inductor configuration.
    """
    from torch._inductor import config, lowering
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    settings = {"fx_graph_cache": False, "compile_threads": 1, "emulate_precision_casts": True, **patches}
    decompositions = {op: f for op, f in select_decomp_table().items() if op not in LOWERINGS}
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    symbols: dict[int, Any] = {}
    with virtual_gpu(target), config.patch(settings), forced_tile(tile):
        with fake_mode:
            fakes = [
                _with_dynamic_sizes(x, dynamic[i], symbols, fake_mode.shape_env)
                if dynamic and i in dynamic
                else torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
                for i, x in enumerate(inputs)
            ]
            graph_module = make_fx(
                fn, decomposition_table=decompositions, tracing_mode="symbolic" if dynamic else "real"
            )(*fakes)
        values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        graph = GraphLowering(
            graph_module, example_inputs=values, shape_env=fake_mode.shape_env, is_inference=True
        )
        with (
            V.set_graph_handler(graph),
            V.set_fake_mode(fake_mode),
            V.set_debug_handler(DebugContext()),
            mock.patch.dict(lowering.lowerings, LOWERINGS),
        ):
            graph.run(*values)
            return graph.codegen()[0].value


def kernel_sources(module: str) -> list[str]:
    """The Triton kernels of a generated module, in order."""
    strings = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", module, re.DOTALL)
    return [string.replace("\\\\", "\\") for string in strings]
