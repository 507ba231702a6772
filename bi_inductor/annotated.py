"""The lowered graph written out line by line, each op with its verdict, order and level."""

from __future__ import annotations

import json

import torch
from torch.fx import GraphModule, Node

from .certificate import Certificate, Entry


def annotated_graph(gm: GraphModule, certificate: Certificate) -> str:
    """Lines ``%name: dtype[shape] = op(arguments)  # VERDICT form (level) file:line``, inputs and outputs included."""
    found = {entry.name: entry for entry in certificate.entries}
    return "\n".join(_line(node, found.get(node.name)) for node in gm.graph.nodes)


def artifact(certificate: Certificate, gm: GraphModule | None = None) -> str:
    """JSON of the certificate, with ``annotated_graph`` if the graph is given: what tlparse gets."""
    lines = annotated_graph(gm, certificate).splitlines() if gm is not None else []
    return json.dumps({**json.loads(certificate.to_json()), "annotated_graph": lines}, indent=1)


def _line(node: Node, entry: Entry | None) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    arguments = [str(argument) for argument in node.args]
    arguments += [f"{name}={value}" for name, value in node.kwargs.items()]
    what = f"{node.target}({', '.join(arguments)})" if node.op == "call_function" else node.op
    line = f"%{node.name}: {_type(node)} = {what}"
    if entry is None:
        return line
    notes = [entry.verdict, entry.form, f"({entry.level})" if entry.form else "", entry.source, entry.reason]
    return f"{line}  # {' '.join(filter(None, notes))}"


def _type(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__ if value is not None else "?"
