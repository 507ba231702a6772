"""Jagged tensors: each sequence has the bits that it has alone. Dynamo leaves stock's op on them to eager on a CPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from devices import compiled

from bi_inductor.passes.attention import scaled_dot_product_attention
from bi_inductor.passes.jagged import jagged_refusal
from bi_inductor.testing import same_bits

LENGTHS = (3, 40, 17)


def jagged(lengths, device="cpu", dtype=torch.float32, longest=True):
    """[B, ragged, 32]; a sequence's numbers are those of its length."""
    rows = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in lengths]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    options = {"max_seqlen": max(lengths), "min_seqlen": min(lengths)} if longest else {}
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows).to(device, dtype), offsets, **options)


def heads(x):
    return x.unflatten(-1, (2, 16)).transpose(1, 2)


def layer(attend, x, is_causal):
    return attend(heads(x), heads(x.sin()), heads(x.cos()), is_causal=is_causal).transpose(1, 2).flatten(2)


def ours(x):
    return layer(scaled_dot_product_attention, x, True)


def stock(x):
    return layer(F.scaled_dot_product_attention, x, True)


def exact(x):
    return [layer(F.scaled_dot_product_attention, row.double()[None], True)[0] for row in x.unbind()]


@pytest.mark.lengthy
def test_it_is_attention_of_each_sequence():
    """In one graph for all packs; the sums are those of ``varlen.py``, whose tests compare their bits."""
    attend = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (17, 3, 40, 5)):
        x = jagged(lengths)
        for row, expected in zip(attend(x).unbind(), exact(x), strict=True):
            assert_accurate(row, expected, slack=4)


@pytest.mark.gpu
def test_a_sequence_has_the_bits_it_has_alone():
    attend = compiled(stock, fullgraph=True, dynamic=True)
    x = jagged(LENGTHS, "cuda", torch.bfloat16)
    together = attend(x).unbind()
    for row, expected in zip(together, exact(x), strict=True):
        assert_accurate(row, expected, slack=4)
    for lengths in ((40,), (17, 3, 40, 5)):
        alone = attend(jagged(lengths, "cuda", torch.bfloat16)).unbind()
        assert same_bits(alone[lengths.index(40)], together[1])


def refusal(*operands, **options):
    return jagged_refusal(SimpleNamespace(args=operands, kwargs=options, meta={}))


def test_what_is_refused():
    x = heads(jagged(LENGTHS))
    other = heads(jagged((4, 5, 6)))
    assert refusal(x, x, x) is None and refusal(x, x, x, is_causal=True) is None
    assert refusal(*[torch.randn(1, 2, 3, 16)] * 3) is None
    for expected, error in {
        "longest sequence": refusal(*[heads(jagged(LENGTHS, longest=False))] * 3),
        "not all jagged": refusal(x, torch.randn(3, 2, 5, 16), x),
        "side by side": refusal(*[x.transpose(1, 2)] * 3),
        "dropout": refusal(x, x, x, dropout_p=0.5),
        "aligned": refusal(x, other, other, is_causal=True),
    }.items():
        assert expected in error.reason
    assert refusal(x, other, other) is None
