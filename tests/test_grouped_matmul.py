"""Grouped products: a row has the bits of an ordinary product with its group's matrix, wherever it stands."""

from unittest import mock

import pytest
import torch
from devices import DEVICES, compiled, random_rows

import bi_inductor
from bi_inductor import BatchInvarianceError, inspect, oracle
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.offline import compile_offline
from bi_inductor.templates import triton_grouped
from bi_inductor.templates.tile_table import candidates
from bi_inductor.testing import same_bits

BF16 = torch.bfloat16
#: Empty groups at the start, in the middle and at the end; rows of no group.
ENDS = {"some empty": [0, 3, 3, 17, 38, 38], "one group": [40], "all in the last": [0, 0, 40], "none": [0, 0]}


def rows(*shape, seed=0):
    return random_rows(*shape, dtype=BF16, seed=seed)


def ends_of(numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def spans(numbers):
    return list(zip([0, *numbers], numbers, strict=False))


def grouped(a, b, ends):
    return torch._grouped_mm(a, b, offs=ends)


def by_oracle(a, b):
    return (oracle.chain_matmul(a, b) + 0.0).to(BF16)


@pytest.mark.parametrize("name", ENDS)
def test_the_kernel_is_the_oracle_s_chain_per_group(name):
    numbers = ENDS[name]
    a, b = rows(40, 72), rows(len(numbers), 72, 24, seed=1)
    result = run_in_interpreter(grouped, a, b, ends_of(numbers))
    for matrix, (start, end) in zip(b, spans(numbers), strict=True):
        assert same_bits(result[start:end], by_oracle(a[start:end], matrix))
    assert same_bits(result[numbers[-1] :], torch.zeros_like(result[numbers[-1] :]))
    left, right = rows(32, 40), rows(40, 24, seed=2)
    result = run_in_interpreter(grouped, left, right, ends_of(numbers))
    for product, (start, end) in zip(result, spans(numbers), strict=True):
        assert same_bits(product, by_oracle(left[:, start:end], right[start:end]))


def test_columns_in_groups_are_rows_of_the_transposed_product():
    a, b, numbers = rows(3, 16, 72), rows(40, 72, seed=1).t(), [5, 5, 40]
    result = run_in_interpreter(grouped, a, b, ends_of(numbers))
    for matrix, (start, end) in zip(a, spans(numbers), strict=True):
        assert same_bits(result[:, start:end], by_oracle(matrix, b[:, start:end]))
    assert result.is_contiguous()


def test_tiles_and_dynamic_shapes_have_no_say():
    a, b, ends = rows(70, 104), rows(3, 104, 80, seed=1), ends_of([7, 7, 66])
    reference = run_in_interpreter(grouped, a, b, ends)
    assert same_bits(run_in_interpreter(grouped, a, b, ends, dynamic=True), reference)
    for tile in candidates("bfloat16", 90)[::3]:
        with mock.patch.object(triton_grouped, "tile_for", lambda *args, t=tile, **kwargs: t):
            assert same_bits(run_in_interpreter(grouped, a, b, ends), reference), tile


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_ignores_its_neighbours_and_its_place(device):
    """Tokens sorted by expert, as a mixture of experts has them: alone, few or many, the bits are those of mm."""
    experts, depth, width = 4, 72, 24
    tokens, weight = rows(65, depth).to(device), rows(experts, depth, width, seed=1).to(device)
    expert = torch.randint(experts, (65,), generator=torch.Generator().manual_seed(2))
    product, mm = compiled(grouped, dynamic=True), compiled(torch.mm, dynamic=True)
    expected = torch.stack([mm(tokens[i : i + 1], weight[e])[0] for i, e in enumerate(expert.tolist())])
    for chosen in (range(65), range(64, 65), range(2), range(3, 20), range(64, -1, -1)):
        order = torch.tensor(sorted(chosen, key=lambda i: int(expert[i])))
        ends = torch.bincount(expert[order], minlength=experts).cumsum(0).int().to(device)
        place = order.to(device)
        assert same_bits(product(tokens[place], weight, ends), expected[place]), chosen
    poisoned = tokens.clone()
    poisoned[1::2] = torch.nan
    order = expert.argsort(stable=True).to(device)
    ends = torch.bincount(expert, minlength=experts).cumsum(0).int().to(device)
    kept = order % 2 == 0
    assert same_bits(product(poisoned[order], weight, ends)[kept], expected[order][kept])


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_grouped_products(device):
    a, weight = rows(40, 72).to(device).requires_grad_(), rows(3, 24, 72, seed=1).to(device).requires_grad_()
    numbers, cotangent = [7, 7, 40], rows(40, 24, seed=2).to(device)

    def layer(a, weight, ends):
        return torch._grouped_mm(a, weight.transpose(1, 2), offs=ends)

    gradients = torch.autograd.grad(
        compiled(layer)(a, weight, ends_of(numbers, device)), (a, weight), cotangent
    )
    forms = [entry.form for entry in bi_inductor.certificates()[-1].entries if entry.form]
    assert sorted(forms) == ["Chain(float32, 24)", "GroupChain(float32)"]
    for expert, (start, end) in enumerate(spans(numbers)):
        here = slice(start, end)
        exact = cotangent[here].double() @ weight[expert].double()
        torch.testing.assert_close(gradients[0][here].double(), exact, rtol=2e-2, atol=1e-3 * 1000)
        exact = cotangent[here].double().t() @ a[here].double()
        scale = exact.abs().max().clamp(min=1e-30)
        assert ((gradients[1][expert].double() - exact).abs() <= 2e-2 * scale).all()


@pytest.mark.lengthy
def test_the_ops_of_transformers_are_grouped_products():
    import transformers.integrations.moe  # noqa: F401  registers the ops

    a, weight = random_rows(40, 72).requires_grad_(), random_rows(3, 72, 24, seed=1).requires_grad_()
    ends, cotangent = ends_of([7, 7, 38]).long(), random_rows(40, 24, seed=2)

    def layer(a, weight, ends):
        return torch.ops.transformers.grouped_mm_fallback(a, weight, ends)

    output = compiled(layer)(a, weight, ends)
    gradients = torch.autograd.grad(output, (a, weight), cotangent)
    with torch.no_grad():
        for expert, (start, end) in enumerate(spans([7, 7, 38])):
            rows, upstream = a[start:end], cotangent[start:end]
            assert same_bits(output[start:end], oracle.chain_matmul(rows, weight[expert]))
            assert same_bits(gradients[0][start:end], oracle.chain_matmul(upstream, weight[expert].t()))
            assert same_bits(gradients[1][expert], oracle.chain_matmul(rows.t(), upstream))
    assert not output[38:].any() and not gradients[0][38:].any()


def test_three_dims_are_an_ordinary_batch():
    a, b = rows(3, 16, 72), rows(3, 72, 24, seed=1)
    product = compiled(lambda a, b: torch._grouped_mm(a, b))
    assert same_bits(product(a, b), compiled(torch.bmm)(a, b))


def test_no_rows():
    """Torch itself has no grouped product without columns or without depth."""
    a, b, ends = rows(0, 72), rows(2, 72, 24), ends_of([0, 0])
    for result in (compiled(grouped)(a, b, ends), run_in_interpreter(grouped, a, b, ends)):
        assert result.shape == (0, 24)


@pytest.mark.lengthy
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_cubins(target):
    family = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}[target]
    weight = rows(8, 512, 1024).transpose(1, 2)
    for a, b in [
        (rows(64, 1024), weight),
        (rows(4096, 1024), weight),
        (rows(4096, 256).t(), rows(4096, 512)),
    ]:
        (kernel,) = compile_offline(inspect(grouped, a, b, ends_of([512] * 8), target=target), target)
        assert family in kernel.ptx and kernel.stack_bytes <= 16, str(kernel)


def test_the_batch_is_not_in_the_fingerprint():
    made = [
        inspect(grouped, rows(m, 72), rows(3, 72, 24), ends_of([0, 1, 2])).certificates[0] for m in (8, 64)
    ]
    assert made[0].fingerprint == made[1].fingerprint


def test_an_epilogue_is_fused_and_reads_the_rounded_value():
    def block(a, b, ends):
        return torch.nn.functional.silu(grouped(a, b, ends)) * 1.5

    a, b, ends = rows(40, 72), rows(3, 72, 24, seed=1), ends_of([5, 9, 40])
    assert len(inspect(block, a, b, ends).kernels) == 1
    unfused = run_in_interpreter(grouped, a, b, ends)
    fused = run_in_interpreter(block, a, b, ends)
    torch.testing.assert_close(fused, torch.nn.functional.silu(unfused) * 1.5, rtol=1e-2, atol=1e-3)


def test_mistakes_get_eager_s_error_and_fp8_is_refused():
    a, b, ends = rows(40, 72), rows(3, 72, 24), ends_of([1, 2, 40])
    with pytest.raises(Exception, match="contraction dimension"):
        compiled(grouped)(a, rows(3, 64, 24), ends)
    with pytest.raises(Exception, match="batch sizes"):
        compiled(grouped)(a, b, ends[:2])
    with pytest.raises(Exception, match=r"int32|integer"):
        compiled(grouped)(a, b, ends.long())
    fp8 = a.to(torch.float8_e4m3fn)[:, :64], b.transpose(1, 2).contiguous()[..., :64].to(torch.float8_e4m3fn)

    def scaled(a, b, x, y, ends):
        return torch._scaled_grouped_mm(a, b.transpose(1, 2), x, y, offs=ends, out_dtype=BF16)

    with pytest.raises(BatchInvarianceError, match="multiply the groups in bfloat16"):
        inspect(scaled, fp8[0].contiguous(), fp8[1].contiguous(), torch.ones(40), torch.ones(3, 24), ends)
