"""``torch.compile(model, backend="batchinv")``: the pipeline on one screen.

    options      what the user asked for, checked
    passes       Dynamo's graph: composites whose stock decomposition follows sizes, made canonical
    AOTAutograd  forward and backward graphs of ATen ops, through our decompositions
    graph        each op ruled on (verdicts), lowered (lowerings, templates), rounded; or refused by name
    codegen      Triton or C++ kernels whose sums have the order of contract.py
    certificate  what each op is and why, inside the generated source

All of Inductor that is not named here is Inductor's, at its full speed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import CompileContext
from torch.fx import GraphModule

from . import scope
from .capture import captured
from .errors import BatchInvarianceError, unwrapped
from .graph_breaks import report_graph_break
from .options import Options, parse


@captured
def batchinv(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile ``gm`` so that every row's bits depend on that row alone.

    Called by Dynamo for ``torch.compile(backend="batchinv", mode=..., options=...)``. Raises OptionError for
    an unknown or contract-breaking option, BatchInvarianceError for an op without a canonical form.
    """
    ours, patches = parse(mode, options)
    _warn_before_dynamo_gives_up()
    report_graph_break(getattr(gm, "compile_subgraph_reason", None))  # for backends that wrap this one
    return compile_graph(gm, example_inputs, ours, patches)


def _warn_before_dynamo_gives_up() -> None:
    """At its recompile limit Dynamo runs the function eagerly, in any order of additions, and says little."""
    compile_id = CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    if compile_id is None or compile_id.frame_compile_id != limit - 1:
        return
    if not torch._dynamo.config.fail_on_recompile_limit_hit:
        warnings.warn(
            f"this function was compiled {limit} times; the next new shape would run eagerly, which is not "
            "batch-invariant. Compile it with dynamic=True, raise torch._dynamo.config.recompile_limit, or set "
            "torch._dynamo.config.fail_on_recompile_limit_hit = True to get an error instead.",
            stacklevel=2,
        )


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], ours: Options, patches: dict[str, Any]
) -> Callable[..., Any]:
    """Run the pipeline with parsed options and Inductor config patches."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from .accumulation.continuing import continue_sums
    from .accumulation.marking import Marked, mark_parameters
    from .accumulation.runtime import with_gradients_continued
    from .decompositions import decompositions
    from .entries import dynamo_floats
    from .graph import refuse_or_warn
    from .host_numbers import refusals
    from .passes.canonicalize import canonicalize
    from .passes.masks import share_masks

    unproven: list[BatchInvarianceError] = []
    floats = dynamo_floats(gm)

    def refuse(error: BatchInvarianceError) -> None:
        refuse_or_warn(error, ours)
        unproven.append(error)

    @functools.wraps(compile_fx_inner)
    def inner_compile(lowered: GraphModule, *args: Any, **kwargs: Any) -> Any:
        # The backward is compiled later, when the first gradient is asked for: outside the block below.
        with unwrapped(), scope.compiling(ours, unproven, patches=patches, floats=floats):
            return compile_fx_inner(share_masks(continue_sums(lowered)), *args, **kwargs)

    with (
        unwrapped(),
        scope.compiling(ours, unproven, patches=patches, floats=floats),
        sdpa_kernel(SDPBackend.MATH),
    ):
        for error in refusals(gm):
            refuse(error)
        canonical = canonicalize(gm, refuse)
        marked = mark_parameters(canonical) if ours.continue_gradients else Marked(canonical)
        compiled = compile_fx(
            marked.gm,
            [*example_inputs, *marked.starts],
            inner_compile=inner_compile,
            config_patches=patches,
            decompositions=decompositions(),
        )
    return with_gradients_continued(compiled, marked.positions) if marked.positions else compiled
