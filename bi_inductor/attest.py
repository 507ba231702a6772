"""The certificate of one graph, made when its code exists: rulings, kernels, and what the verifier followed in them."""

from __future__ import annotations

import dataclasses
import logging
import platform
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch._logging import trace_structured

from . import __version__, annotated, entries, verifier
from .certificate import Certificate, Entry, Environment, Kernel, Level
from .verifier import ExaminedKernel
from .verifier.lengths import Forms

if TYPE_CHECKING:
    from .graph import BatchInvariantGraphLowering

log = logging.getLogger("bi_inductor")
#: Hashes of certificates made in this process whose graph has not been handed out yet.
_announced: set[int] = set()


def attest(graph: BatchInvariantGraphLowering, source: str) -> Certificate:
    """The certificate of ``graph``, whose generated module is ``source``. Raises BatchInvarianceError for what the
    verifier finds, unless stock lowerings were asked for: then nothing is claimed beyond the rulings."""
    example = _example(graph)
    made = Certificate(
        entries=_entries(graph, example),
        kernels=(),
        inputs=entries.tensor_inputs(graph.module.graph, example),
        outputs=entries.outputs(graph.module.graph),
        target=target_of(graph),
        environment=_environment(graph),
        floats=tuple(sorted(example.floats.items())),
        symbols=tuple(
            (str(symbol), int(value))
            for symbol, value in graph.sizevars.shape_env.backed_var_to_val.items()
            if value.is_Integer
        ),
        guards=tuple(dict.fromkeys(str(guard.expr) for guard in graph.sizevars.shape_env.guards)),
        is_backward=bool(graph.is_backward),
    )
    is_verified = not graph.has_unproven
    read = verifier.check if is_verified else verifier.examine
    examination = read(source, made, graph.kernel_ops)
    made = with_levels(made, examination.kernels, graph.kernel_ops, is_verified)
    log.debug("%s\n%s", made, annotated.annotated_graph(graph.module, made))
    _trace(lambda: annotated.artifact(made, graph.module))
    _announced.add(hash(made))
    return made


def announce_loaded(made: Certificate | None) -> None:
    """Log and trace the certificate of a graph that is handed out, unless that was done when it was made.

    Of a graph from a cache there is no graph left to annotate.
    """
    if made is None or hash(made) in _announced:
        _announced.discard(hash(made))
        return
    log.debug("loaded from a cache: %s", made)
    _trace(lambda: annotated.artifact(made))


def target_of(graph: BatchInvariantGraphLowering) -> str:
    """ "cuda" if the graph computes on a GPU, else "cpu"."""
    return "cuda" if "cuda" in graph.device_types else "cpu"


def _example(graph: BatchInvariantGraphLowering) -> entries.Example:
    known = graph.sizevars.shape_env.backed_var_to_val
    return entries.Example(
        simplified=graph.sizevars.simplify,
        at_example=lambda length: length.xreplace(known) if hasattr(length, "xreplace") else length,
        floats=entries.float_inputs(graph.module.graph, graph.floats),
    )


def _entries(graph: BatchInvariantGraphLowering, example: entries.Example) -> tuple[Entry, ...]:
    return (*map(entries.unproven_entry, graph.unproven), *_entries_of_ops(graph, example))


def _entries_of_ops(graph: BatchInvariantGraphLowering, example: entries.Example) -> Iterator[Entry]:
    for node in graph.module.graph.nodes:
        if node in graph.rulings:
            yield entries.entry_of(node, graph.rulings[node], example)
    for body in graph.bodies:
        yield from _entries_of_ops(body, example)


def _environment(graph: BatchInvariantGraphLowering) -> Environment:
    versions = {"batchinv": __version__, "torch": str(torch.__version__)}
    if target_of(graph) == "cuda":
        import triton

        device = torch.cuda.get_device_properties()
        name, architecture = device.name, f"sm_{device.major}{device.minor}"
        versions["triton"] = triton.__version__
    else:
        name = platform.processor() or platform.machine()
        architecture = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    options = dataclasses.asdict(graph.options)
    asked = {**{f"batchinv.{key}": value for key, value in options.items()}, **graph.patches}
    return Environment(
        name,
        architecture,
        tuple(versions.items()),
        tuple(sorted((key, str(value)) for key, value in asked.items())),
    )


def with_levels(
    made: Certificate,
    examined: tuple[ExaminedKernel, ...],
    ops_of: dict[str, set[str]],
    is_verified: bool,
) -> Certificate:
    """``made`` with its kernels, and ops at the level to which the verifier followed them.

    ``ops_of``: kernel name -> names of its ops, where the comment above the kernel does not say.
    """
    by_name = {entry.name: entry for entry in made.entries}
    levels: dict[str, str] = {}
    kernels = []
    for kernel in examined:
        names = kernel.nodes | ops_of.get(kernel.name, set())
        ops = [by_name[name] for name in by_name if name in names]
        if is_verified:
            levels |= {op.name: Level.SOURCE.value for op in ops if _is_retraced(op, kernel)}
        kernels.append(_kernel(kernel, ops, is_verified))
    found = (dataclasses.replace(entry, level=levels.get(entry.name, entry.level)) for entry in made.entries)
    return dataclasses.replace(made, entries=tuple(found), kernels=tuple(kernels))


def _is_retraced(op: Entry, kernel: ExaminedKernel) -> bool:
    """True if the verifier followed a sum or product of the op's form in the kernel."""
    if not op.form:
        return False
    forms = Forms([op])
    wanted = forms.trees | {("chain", length) for _, length in forms.chains}
    wanted |= {("chunks", length) for _, length, _, _ in forms.chunked}
    wanted |= {("group chain", ())} if forms.group_chains else set()
    wanted |= {("attention", ())} if forms.attentions else set()
    wanted |= {("attention gradient", ())} if forms.attention_gradients else set()
    wanted |= {("chunks", length) for _, length, *_ in forms.chunked}
    wanted |= {("group chain", ()) for _ in forms.group_chains}
    return bool(wanted) and wanted <= kernel.retraced


def _kernel(kernel: ExaminedKernel, ops: list[Entry], is_verified: bool) -> Kernel:
    return Kernel(
        name=kernel.name,
        language="triton" if kernel.is_triton else "cpp",
        ops=tuple(op.name for op in ops),
        forms=tuple(dict.fromkeys(op.form for op in ops if op.form)),
        schedule=_triton_schedule(kernel.text) if kernel.is_triton else _cpp_schedule(kernel.text),
        sources=tuple(dict.fromkeys(op.source for op in ops if op.source)),
        retraced=tuple(sorted({kind for kind, _ in kernel.retraced})) if is_verified else (),
        level=(Level.SOURCE if is_verified else Level.NONE).value,
    )


def _triton_schedule(text: str) -> tuple[str, ...]:
    """What the kernel's decorator leaves to choose or has chosen: kind of loop, sizes, blocks of a template."""
    found = re.search(r"@triton_heuristics\.(\w+)\(", text)
    chosen = [found[1].replace("_", " ") if found else "unknown"]
    for pattern in (r"size_hints=\{([^}]*)\}", r"reduction_hint=ReductionHint\.(\w+)"):
        match = re.search(pattern, text)
        chosen += [re.sub(r"'(\w+?)_?': ", r"\1 about ", match[1])] if match else []
    chosen += [
        f"{name} {value}"
        for name, value in re.findall(r"^    ((?:\w+_)?BLOCK\w*|SWAP) ?: tl\.constexpr = (\w+)$", text, re.M)
    ]
    chosen += [f"{name} {value}" for name, value in re.findall(r"^(num_\w+)=(\d+)", text, re.M)]
    return tuple(chosen)


def _cpp_schedule(text: str) -> tuple[str, ...]:
    """Whether the kernel's loops over outputs are shared between threads and done by vectors."""
    threads = re.search(r"#pragma omp parallel num_threads\((\d+)\)", text)
    chosen = [f"{threads[1]} threads" if threads else "one thread"]
    return (*chosen, "vectors" if "at::vec::Vectorized" in text.rpartition('extern "C"')[2] else "scalars")


def _trace(payload: Callable[[], str]) -> None:
    """One structured artifact for each graph, which tlparse shows beside the generated code."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "batchinv_certificate", "encoding": "json"},
        payload_fn=payload,
    )
