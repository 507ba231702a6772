"""The one place that installs anything into Inductor, and takes it out again.

Inside ``compiling(options)`` the calling thread compiles under the contract. Everything installed is a
delegate: it does our thing for a thread that is inside the scope and exactly Inductor's for all others.
Delegates go in with the first scope and come out with the last, under a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import _compat
from .declared_ops import declarations
from .errors import BatchInvarianceError
from .options import Options, required_patches

_lock = threading.RLock()
_depth = 0
_originals: list[tuple[Any, str, Any]] = []
_active = threading.local()


def _options() -> Options | None:
    """The options of the compile this thread is in, or None outside our scope."""
    return getattr(_active, "options", None)


@contextlib.contextmanager
def compiling(
    options: Options,
    unproven: Sequence[BatchInvarianceError] = (),
    *,
    patches: Mapping[str, Any] = MappingProxyType({}),
    floats: Mapping[int, float] = MappingProxyType({}),
) -> Iterator[None]:
    """Compile under the contract in this thread until the block is left, however it is left.

    What goes into the certificates: ``unproven``, refusals the user turned into warnings; ``patches``, Inductor's
    settings as the user asked for them; ``floats``, see ``entries.dynamo_floats``.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config
    from torch._inductor.virtualized import V
    from torch.compiler import config as compiler_config

    from .choices import BatchInvariantChoices

    tag = f"{compiler_config.cache_key_tag}{cache_tag(options)}"
    with contextlib.ExitStack() as stack:
        # Dynamo compiles one graph at a time; a backward is compiled without it. Up to torch 2.11 a config
        # patch is seen by all threads, so no other compile may start while ours are in place.
        stack.enter_context(compile_lock)
        if _options() is None:  # a compile inside a compile is already tagged
            stack.enter_context(compiler_config.patch(cache_key_tag=tag))
            stack.enter_context(config.patch(required_patches()))
        stack.enter_context(_installed())
        about = {"unproven": unproven, "patches": patches, "floats": floats}
        stack.enter_context(_activated(options=options, **about))
        stack.enter_context(V.set_choices_handler(BatchInvariantChoices()))
        yield


@contextlib.contextmanager
def _activated(**about: Any) -> Iterator[None]:
    before = vars(_active).copy()
    vars(_active).update(about)
    try:
        yield
    finally:
        vars(_active).clear()
        vars(_active).update(before)


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    global _depth
    with _lock:
        if _depth == 0:
            _install()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore()


def _replace(owner: Any, name: str, delegate: Any) -> None:
    _originals.append((owner, name, vars(owner)[name]))
    setattr(owner, name, delegate)


def _restore() -> None:
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _install() -> None:
    try:
        _install_partitioner()
        _install_graph_lowering()
        _install_code_generators()
        _install_reductions()
        _install_division()
        _install_strides()
        _install_size_comparison()
        _install_certificate_reader()
    except BaseException:
        _restore()
        raise


def _install_partitioner() -> None:
    """What changes is where a mask is computed, and how much memory there is between forward and backward."""
    from torch._inductor import compile_fx

    from .passes.masks import recompute_masks

    stock = compile_fx.min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        if _options() is not None:
            recompute_masks(joint)
        return stock(joint, *args, **kwargs)

    _replace(compile_fx, "min_cut_rematerialization_partition", partition)


def _install_graph_lowering() -> None:
    from torch._inductor import compile_fx

    from .graph import BatchInvariantGraphLowering

    stock = compile_fx.GraphLowering

    def lowering(*args: Any, **kwargs: Any) -> Any:
        options = _options()
        if options is None:
            return stock(*args, **kwargs)
        graph = BatchInvariantGraphLowering(*args, **kwargs)
        graph.options, graph.unproven = options, tuple(_active.unproven)
        graph.patches, graph.floats = _active.patches, _active.floats
        return graph

    _replace(compile_fx, "GraphLowering", lowering)


def _install_code_generators() -> None:
    from torch._inductor import ir, scheduler
    from torch._inductor.codegen import common

    stock = common.get_scheduling_for_device

    def scheduling_for(device: str) -> Any:
        registered = stock(device)
        if registered is None or _options() is None:
            return registered
        return _our_scheduling(device) or registered

    for module in (common, scheduler, ir):
        _replace(module, "get_scheduling_for_device", scheduling_for)


def _our_scheduling(device: str) -> Any:
    if device == "cuda":
        from .codegen.triton import BatchInvariantTritonScheduling

        return BatchInvariantTritonScheduling
    if device == "cpu":
        from .codegen.cpp import BatchInvariantCppScheduling

        return BatchInvariantCppScheduling
    return None


def _install_reductions() -> None:
    from torch._inductor import ir, lowering

    from .lowerings import reductions

    stock_create = ir.Reduction.create
    stock_two_step = lowering.use_two_step_variance

    def create(cls: type, *args: Any, **kwargs: Any) -> Any:
        if _options() is None or cls is not ir.Reduction:
            return stock_create.__func__(cls, *args, **kwargs)
        return reductions.create(stock_create, *args, **kwargs)

    def use_two_step_variance(*args: Any, **kwargs: Any) -> bool:
        return True if _options() is not None else stock_two_step(*args, **kwargs)

    _replace(ir.Reduction, "create", classmethod(create))
    _replace(lowering, "use_two_step_variance", use_two_step_variance)


def _install_division() -> None:
    """A quotient is a quotient: stock multiplies by the reciprocal when it can see that a divisor is constant,
    which a length is in a static graph and is not in a dynamic one."""
    from torch._inductor import lowering

    stock = lowering.get_constant_value

    def get_constant_value(x: Any) -> Any:  # its only caller is the lowering of division
        return None if _options() is not None else stock(x)

    _replace(lowering, "get_constant_value", get_constant_value)


def _install_strides() -> None:
    """What changes is how long a compile takes."""
    from torch._inductor.codegen import cpp

    from .codegen.cpp_strides import stride_at_vec_range as by_terms

    stock = cpp.stride_at_vec_range

    def stride_at_vec_range(index: Any, var: Any, vec_length: int | None = None) -> Any:
        return (
            stock(index, var, vec_length) if _options() is None else by_terms(index, var, vec_length, stock)
        )

    _replace(cpp, "stride_at_vec_range", stride_at_vec_range)


def _install_size_comparison() -> None:
    """Ops of a kernel have the kernel's size however it is written: a dynamic graph has s*(t - 1) beside s*t - s."""
    if not _compat.compares_sizes_as_written():
        return
    from torch._inductor import tiling_utils
    from torch._inductor.utils import sympy_product
    from torch._inductor.virtualized import V

    stock = tiling_utils.get_pw_red_splits

    def get_pw_red_splits(node: Any, pointwise_numel: Any, *args: Any, **kwargs: Any) -> Any:
        if _options() is not None:
            size = sympy_product(node._body.sizes[0])
            if V.graph.sizevars.statically_known_equals(size, pointwise_numel):
                pointwise_numel = size
        return stock(node, pointwise_numel, *args, **kwargs)

    _replace(tiling_utils, "get_pw_red_splits", get_pw_red_splits)


def _install_certificate_reader() -> None:
    from torch._inductor.output_code import CompiledFxGraph

    from . import attest, certificate

    stock: Callable[..., Any] = CompiledFxGraph.post_compile

    def post_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        if _options() is not None:  # a graph generated for inspection only has no source on disk
            attest.announce_loaded(certificate.record_from(getattr(self, "source_code", "")))
        return result

    _replace(CompiledFxGraph, "post_compile", post_compile)


def cache_tag(options: Options) -> str:
    """What enters every compile-cache key: our sources, our options, what is declared. Inductor's own keys hold the
    rest."""
    declared = hashlib.sha256(repr(sorted(declarations().items())).encode()).hexdigest()[:16]
    return f"batchinv-{_source_hash()}-{options}-{declared}"


def _source_hash() -> str:
    global _sources
    if _sources is None:
        digest = hashlib.sha256()
        root = Path(__file__).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".h"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
        _sources = digest.hexdigest()[:32]
    return _sources


_sources: str | None = None
