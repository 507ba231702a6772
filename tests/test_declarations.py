"""Custom ops and user Triton kernels: refused until declared, then compiled by stock and named in the certificate."""

import pytest
import torch
import triton
import triton.language as tl
from devices import compiled, random_rows

import bi_inductor
from bi_inductor import BatchInvarianceError, DeclarationError, verifier
from bi_inductor.options import Options
from bi_inductor.scope import cache_tag
from bi_inductor.testing import same_bits


@torch.library.custom_op("batchinv_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("batchinv_tests::sum", mutates_args=())
def named_like_ours(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)


@torch.library.custom_op("batchinv_tests::clone", mutates_args=())
def named_like_a_move(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean()


@torch.library.custom_op("batchinv_tests::triple_", mutates_args=("x",))
def triple_(x: torch.Tensor) -> None:
    x.mul_(3)


double.register_fake(torch.empty_like)
named_like_ours.register_fake(lambda x: x.new_empty(x.shape[:-1]))
named_like_a_move.register_fake(torch.empty_like)
triple_.register_fake(lambda x: None)


@triton.jit
def negated(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, -tl.load(source + place, mask=place < count), mask=place < count)


def launched(x):
    out = torch.empty_like(x)
    negated[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out.softmax(-1)


@pytest.mark.parametrize("op", [double, named_like_ours, named_like_a_move])
def test_a_custom_op_is_refused_whatever_it_is_called(op):
    with pytest.raises(BatchInvarianceError, match="custom op") as caught:
        compiled(lambda x: op(x) + 1)(torch.ones(2, 3))
    assert "declare_invariant(" in caught.value.remedy


def test_a_declared_op_is_compiled_and_named_with_its_reason():
    x = random_rows(4, 9)
    with bi_inductor.declare_invariant("batchinv_tests::double", reason="one element at a time"):
        assert same_bits(
            compiled(lambda x: double(x).softmax(-1))(x), compiled(lambda x: (x * 2).softmax(-1))(x)
        )
        (declared,) = (
            entry
            for certificate in bi_inductor.certificates()[-2:]
            for entry in certificate.entries
            if entry.verdict == "DECLARED"
        )
        assert (declared.op, declared.reason) == ("batchinv_tests::double", "one element at a time")
        assert "one element at a time" in str(bi_inductor.certificates()[-2])
    torch._dynamo.reset()
    with pytest.raises(BatchInvarianceError, match="custom op"):
        compiled(lambda x: double(x).softmax(-1))(x)


def test_a_declared_op_may_write_to_its_input():
    def writes(x):
        y = x + 1
        triple_(y)
        return y

    with bi_inductor.declare_invariant("batchinv_tests::triple_", reason="one element at a time"):
        assert same_bits(compiled(writes)(torch.ones(3)), torch.full((3,), 6.0))


def test_the_verifier_allows_what_is_declared_and_nothing_else():
    def two(x):
        return double(x) + 1

    with bi_inductor.declare_invariant("batchinv_tests::double", reason="one element at a time"):
        graph = bi_inductor.inspect(two, torch.ones(3), target="cpu").graphs[0]
    call = "torch.ops.batchinv_tests.double.default("
    assert call in graph.source and not verifier.verify(graph.source, graph.certificate)
    other = graph.source.replace(call, "torch.ops.batchinv_tests.clone.default(")
    assert verifier.verify(other, graph.certificate)


def test_a_triton_kernel_is_refused_until_declared():
    x = random_rows(4, 9)
    with pytest.raises(BatchInvarianceError, match=r"declare_invariant\(\"triton::negated\""):
        bi_inductor.inspect(launched, x, target="sm_90")
    with bi_inductor.declare_invariant("triton::negated", reason="one element at a time"):
        (graph,) = bi_inductor.inspect(launched, x, target="sm_90").graphs
    assert any(
        entry.op == "triton::negated" and entry.verdict == "DECLARED" for entry in graph.certificate.entries
    )
    assert verifier.verify(graph.source.replace("negated_0", "other_0"), graph.certificate)


def test_declarations_are_in_the_cache_key():
    before = cache_tag(Options())
    with bi_inductor.declare_invariant("batchinv_tests::double", reason="one"):
        first = cache_tag(Options())
        bi_inductor.declare_invariant("batchinv_tests::double", reason="another")
        assert len({before, first, cache_tag(Options())}) == 3
    assert cache_tag(Options()) == before


@pytest.mark.parametrize(
    ("op", "reason", "message"),
    [
        ("batchinv_tests::doubl", "x", "did you mean 'batchinv_tests::double'"),
        ("double", "x", "'namespace::name'"),
        ("batchinv_tests::double.default", "x", "without an overload"),
        ("aten::sum", "x", "not a custom op"),
        ("batchinv_tests::double", " ", "must not be empty"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(op, reason, message):
    with pytest.raises(DeclarationError, match=message):
        bi_inductor.declare_invariant(op, reason=reason)
    assert op not in bi_inductor.declarations()


def test_only_what_is_declared_can_be_taken_back():
    with pytest.raises(DeclarationError, match="not declared"):
        bi_inductor.undeclare("batchinv_tests::double")
