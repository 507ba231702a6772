"""Graphs drawn by Hypothesis: chains of pointwise ops, reductions and products, rows alone against rows together."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from bi_inductor.testing import changed_rows_over_batches

WIDTH = 24

#: Each step maps [rows, middle, WIDTH] to the same shape, and any two of its rows do not meet.
STEPS = {
    "scale": lambda x: x * 0.37 + 1.1,
    "gelu": F.gelu,
    "tanh": lambda x: torch.tanh(x) - x,
    "exp": lambda x: torch.exp(-x.abs()),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(1),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,)),
    "centre": lambda x: x - x.mean(1, keepdim=True),
    "standardise": lambda x: x / (1 + x.std((1, 2), keepdim=True)),
    "maximum": lambda x: x - x.amax(-1, keepdim=True),
    "project": lambda x: x @ torch.full((WIDTH, WIDTH), 0.3, dtype=x.dtype, device=x.device).tril(),
    "attend": lambda x: F.scaled_dot_product_attention(x, x, x),
    "reverse": lambda x: x.flip(1).transpose(1, 2).contiguous().transpose(1, 2),
}

chains = st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=6)
@given(chain=chains, dtype=dtypes, middle=st.sampled_from([1, 5, 17]), branch=st.booleans())
def test_rows_of_random_graphs_do_not_depend_on_the_batch(device, chain, dtype, middle, branch):
    def graph(x):
        start = x
        for name in chain:
            x = STEPS[name](x)
        return (x, x + start, x.sum(-1)) if branch else x

    torch._dynamo.reset()
    x = random_rows(9, middle, WIDTH, dtype=dtype, device=device)
    changed = changed_rows_over_batches(compiled(graph, dynamic=True), [x], [1, 2, 3, 9])
    assert set(changed) == {1, 2, 3, 9} and not any(changed.values()), (chain, changed)
