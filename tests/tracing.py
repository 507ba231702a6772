"""The ATen graphs that AOTAutograd makes of a function after our rewrites, without compiling them."""

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree

from bi_inductor.decompositions import decompositions
from bi_inductor.passes.canonicalize import canonicalize

#: Views and copies: they move values, and whether one is needed may follow strides.
MOVEMENT = frozenset(
    "view _unsafe_view reshape expand permute transpose t clone squeeze unsqueeze slice select detach alias"
    " as_strided sym_size split split_with_sizes unbind cat constant_pad_nd".split()
)


def traced(fn, *inputs, dynamic=False, backward=True):
    """Forward graph and, where a result requires a gradient, backward graph, as a list of GraphModules."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    def backend(graph, example_inputs):
        stage = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=decompositions())
        return stage(canonicalize(graph), example_inputs)

    torch._dynamo.reset()
    outputs = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    outputs = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and backward:
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return graphs


def computing_targets(graph):
    """Names of the ATen ops of a graph that compute, in order: movement and size arithmetic are left out."""
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    ops = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    return [str(op) for op in ops if op.overloadpacket.__name__ not in MOVEMENT]
