"""Sorts have one answer; a prefix depends on its own elements alone."""

import pytest
import torch
from devices import DEVICES, compiled, over_batches, random_rows
from torch._inductor.codegen.triton import TritonKernelOverrides

import bi_inductor
from bi_inductor import oracle, verifier
from bi_inductor.codegen import triton_ops
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import same_bits

#: One element; past one level of blocks; past three.
LENGTHS = (1, 9, 600)


def with_ties(*shape, dtype=torch.float32, device="cpu"):
    """Many equal values, both zeros, both infinities, NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 4, shape, generator=generator).to(dtype)
    special = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    chosen = torch.randint(0, 16, shape, generator=generator)
    return torch.where(chosen < 4, special[chosen.clamp(max=3)], x).to(device)


def stable(x, descending=False):
    """The one answer, by Python's stable sort. (Eager's own order of -0.0 and 0.0 follows its algorithm.)"""

    def key(value):
        return (descending != (value != value), 0.0 if value != value else -value if descending else value)

    order = torch.tensor([sorted(range(len(row)), key=lambda i: key(row[i])) for row in x.tolist()])
    return x.gather(-1, order), order


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_sort_is_the_stable_one(device, dtype, descending):
    x = with_ties(6, 70, dtype=dtype)
    expected, order = stable(x, descending)

    def sorts(x):
        along = x.t().sort(dim=0, descending=descending)
        return *x.sort(descending=descending), x.argsort(-1, descending), along.indices.t().contiguous()

    values, indices, positions, along = (r.cpu() for r in compiled(sorts)(x.to(device)))
    assert torch.equal(values.isnan(), expected.isnan())  # moving a bf16 NaN may change its payload
    assert same_bits(values.masked_fill(values.isnan(), 0), expected.masked_fill(expected.isnan(), 0))
    assert all(torch.equal(found, order) for found in (indices, positions, along))


def test_integers_are_sorted_stably():
    x = with_ties(6, 70).nan_to_num(0, 5, -5).int()
    for descending in (False, True):
        torch._dynamo.reset()
        values, indices = compiled(lambda x, d=descending: x.sort(descending=d))(x)
        expected = x.sort(dim=-1, descending=descending, stable=True)
        assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_topk_takes_the_first_of_equals(device, largest):
    x = with_ties(6, 70)
    expected, order = stable(x, largest)
    values, indices = compiled(lambda x: x.topk(9, largest=largest))(x.to(device))
    assert same_bits(values.cpu(), expected[:, :9])
    assert torch.equal(indices.cpu(), order[:, :9])


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_the_rows_of_a_router_do_not_see_the_batch(device):
    def route(x):
        weights, experts = x.softmax(-1).topk(4)
        return weights / weights.sum(-1, keepdim=True), experts, weights.cumsum(-1)

    bi_inductor.assert_batch_invariant(
        over_batches(route), random_rows(16, 64, device=device), batches=(1, 2, 7, 16)
    )


@pytest.mark.lengthy
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_scans_equal_the_oracle(device, dynamic):
    for length in LENGTHS:
        torch._dynamo.reset()
        x = random_rows(3, length, device=device)
        factors = 1 + x / 4096

        def scans(x, factors):
            return x.cumsum(-1), x.t().cumsum(0).t().contiguous(), factors.cumprod(-1)

        sums, along, products = compiled(scans, dynamic=dynamic)(x, factors)
        assert same_bits(sums, oracle.scan(x)), length
        assert same_bits(along, oracle.scan(x))
        assert same_bits(products, oracle.scan(factors, "prod"))


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_prefix_does_not_depend_on_what_follows(device):
    call = compiled(lambda x: x.cumsum(-1), dynamic=True)
    x = random_rows(4, 600, device=device)
    whole = call(x)
    for length in (9, 513):
        assert same_bits(call(x[:, :length].contiguous()), whole[:, :length].contiguous())


def test_bf16_is_summed_wide_and_rounded_once():
    x = random_rows(3, 100, dtype=torch.bfloat16)
    assert same_bits(compiled(lambda x: x.cumsum(-1))(x), oracle.scan(x).bfloat16())


def test_integer_scans_are_exact():
    x = torch.randint(-9, 9, (4, 100))
    mask = x > 0
    sums, counts = compiled(lambda x, mask: (x.cumsum(-1), mask.cumsum(0)))(x, mask)
    assert torch.equal(sums, x.cumsum(-1)) and torch.equal(counts, mask.cumsum(0))


@pytest.mark.lengthy
def test_gradient_of_a_scan():
    x = random_rows(3, 50).requires_grad_()
    upstream = random_rows(3, 50, seed=1)
    compiled(lambda x: x.cumsum(-1))(x).backward(upstream)
    assert same_bits(x.grad, oracle.scan(upstream.flip(-1)).flip(-1))


def test_the_triton_kernels_have_the_oracles_bits():
    x = random_rows(3, 300)
    assert same_bits(run_in_interpreter(lambda x: x.cumsum(-1), x), oracle.scan(x))
    y = with_ties(3, 100)
    values, indices = run_in_interpreter(lambda y: y.sort(-1), y)
    expected, order = stable(y)
    assert same_bits(values, expected) and torch.equal(indices, order)


def spread_of_prefixes(x):
    return x.cumsum(-1).var(-1)


def test_a_prefix_has_no_block_that_ends_behind_it_when_their_kernels_are_one():
    for length in (7, 8, 9, 16):
        x = random_rows(3, length)
        expected = oracle.var_mean(oracle.scan(x), -1)[0]
        assert same_bits(run_in_interpreter(spread_of_prefixes, x), expected), length


def test_without_the_mask_of_a_load_from_registers_it_has(monkeypatch):
    """The guard for it switched off; torch 2.14 has one of its own."""
    monkeypatch.setattr(triton_ops.TritonOps, "masked", staticmethod(TritonKernelOverrides.masked))
    x = random_rows(3, 8)
    lost = not same_bits(run_in_interpreter(spread_of_prefixes, x), oracle.var_mean(oracle.scan(x), -1)[0])
    assert lost == (torch.__version__ < "2.14")


@pytest.mark.lengthy
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_fused_with_a_scan_has_the_oracles_bits(device, dynamic):
    for length in (3, 8, 16, 24):
        torch._dynamo.reset()
        x = random_rows(5, length, device=device)
        found = compiled(spread_of_prefixes, dynamic=dynamic)(x)
        assert same_bits(found.cpu(), oracle.var_mean(oracle.scan(x.cpu()), -1)[0]), length


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_product_scan_is_right(device):
    x = (1 + random_rows(40, 16, seed=2) / 64).to(device)
    upstream = random_rows(40, 16, seed=1).to(device)
    expected = x.double().requires_grad_()
    expected.cumprod(-1).backward(upstream.double())
    leaf = x.clone().requires_grad_()
    compiled(lambda x: x.cumprod(-1))(leaf).backward(upstream)
    torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-2)


def test_an_unstable_sort_in_a_kernel_is_found():
    source = bi_inductor.inspect(lambda y: y.sort(-1), with_ties(3, 100), target="sm_90").source
    assert "stable=True" in source and not verifier.verify(source)
    assert verifier.verify(source.replace("stable=True", "stable=False"))


def test_stock_scans_in_another_order():
    """Negative control: the lengths above tell orders apart."""
    x = random_rows(3, 600)
    assert not same_bits(torch.compile(lambda x: x.cumsum(-1), backend="inductor")(x), oracle.scan(x))
