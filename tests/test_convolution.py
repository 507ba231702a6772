"""Convolutions are matrix products over windows: batch and positions are rows, and cannot enter the order."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import oracle
from bi_inductor.decompositions import convolution
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import changed_rows_over_batches, same_bits

aten = torch.ops.aten
BATCHES = (1, 2, 7, 16)


def integers(*shape):
    """Small integers: every order of additions gives the exact result."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).double()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_and_gradients_are_eagers(dims, transposed):
    """The rewriting itself, over strides, paddings, dilations, groups and output paddings."""
    x = integers(2, 4, *(9, 8, 7)[:dims])
    checked = 0
    for stride, padding, dilation, groups in itertools.product((1, 2, 3), (0, 2), (1, 2), (1, 2, 4)):
        channels = (4, 8 // groups) if transposed else (8, 4 // groups)
        weight, bias = integers(*channels, *(3, 2, 1)[:dims]), integers(8)
        extra = [1 if transposed and max(stride, dilation) > 1 else 0] * dims
        how = [[stride] * dims, [padding] * dims, [dilation] * dims, transposed, extra, groups]
        out = aten.convolution(x, weight, bias, *how)
        upstream = integers(*out.shape)
        assert torch.equal(convolution._convolution(x, weight, bias, *how), out), how
        layouts = [torch.contiguous_format] + [torch.channels_last] * (dims == 2)
        for layout in layouts:
            operands = [tensor.contiguous(memory_format=layout) for tensor in (upstream, x, weight)]
            backward = (*operands, [8], *how, [True] * 3)
            expected = aten.convolution_backward(*backward)
            for a, e in zip(convolution._convolution_backward(*backward), expected, strict=True):
                assert torch.equal(a, e), (how, layout)
        checked += 1
    assert checked == 36


CASES = {
    "1d": lambda x, w: F.conv1d(x.flatten(2), w.flatten(2)),
    "2d": lambda x, w: F.conv2d(x, w, padding=1),
    "2d, strided": lambda x, w: F.conv2d(x, w, stride=2, padding="valid"),
    "depthwise": lambda x, w: F.conv2d(x, w[:, :1], padding="same", groups=8),
    "transposed": lambda x, w: F.conv_transpose2d(x, w, stride=2),
    "channels last": lambda x, w: F.conv2d(x.contiguous(memory_format=torch.channels_last), w),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_depend_on_the_batch(device, name):
    x, w = random_rows(16, 8, 9, 9, device=device), random_rows(8, 8, 3, 3, device=device, seed=1)
    call = over_batches(lambda x: CASES[name](x, w))
    bi_inductor.assert_batch_invariant(call, x, batches=BATCHES)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_input_gradients_do_not_depend_on_the_batch(device):
    w = random_rows(8, 8, 3, 3, device=device, seed=1)
    call = over_batches(lambda x: F.conv2d(x, w, stride=2, padding=1))

    def gradient(x):
        x = x.detach().requires_grad_()
        out = call(x)
        return torch.autograd.grad(out, x, torch.ones_like(out))[0]

    bi_inductor.assert_batch_invariant(gradient, random_rows(16, 8, 9, 9, device=device), batches=BATCHES)


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_is_the_oracles(device):
    """bf16: kernel positions outermost, row-major, then channels, one ascending chain, rounded once."""
    x = random_rows(3, 8, 9, 9, dtype=torch.bfloat16, device=device)
    w = random_rows(5, 8, 3, 3, dtype=torch.bfloat16, device=device, seed=1)
    columns = F.unfold(x.cpu().float(), 3).bfloat16().transpose(1, 2).flatten(0, 1)
    columns = columns.unflatten(1, (8, 9)).transpose(1, 2).flatten(1)
    chain = oracle.chain_matmul(columns, w.cpu().movedim(1, -1).flatten(1).t()).bfloat16()
    expected = chain.reshape(3, 7, 7, 5).permute(0, 3, 1, 2).contiguous()
    result = compiled(lambda x, w: F.conv2d(x, w))(x, w).cpu().contiguous()
    if device == "cpu":
        assert same_bits(result, expected)
    else:  # tensor cores add a few products at a time; the order of the groups is the chain's
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("groups", [1, 3])
def test_windows_filled_up_to_16_bytes_have_the_oracles_bits(groups):
    """27 and 9 elements of bf16 on a GPU, without one: the zeros behind them are no part of the sum."""
    x, w = (
        random_rows(2, 3, 5, 5, dtype=torch.bfloat16),
        random_rows(6, 3 // groups, 3, 3, dtype=torch.bfloat16),
    )
    result = run_in_interpreter(lambda x, w: F.conv2d(x, w, groups=groups), x, w)
    for group, (part, weight) in enumerate(zip(x.chunk(groups, 1), w.chunk(groups), strict=True)):
        columns = F.unfold(part.float(), 3).bfloat16().transpose(1, 2).flatten(0, 1)
        columns = columns.unflatten(1, (-1, 9)).transpose(1, 2).flatten(1)
        chain = oracle.chain_matmul(columns, weight.movedim(1, -1).flatten(1).t()).bfloat16()
        expected = chain.reshape(2, 3, 3, -1).movedim(-1, 1).contiguous()
        assert same_bits(result.chunk(groups, 1)[group].contiguous(), expected)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_small_image_model_trains_the_same_in_every_compile(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.GroupNorm(2, 8),
        torch.nn.SiLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.Conv2d(8, 4, 1),
    ).to(device)
    x = random_rows(4, 3, 12, 12, device=device)
    gradients = []
    for compiling in (functools.partial(compiled, dynamic=False), over_batches):
        torch._dynamo.reset()
        model.zero_grad()
        compiling(model)(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(same_bits, *gradients))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_strides_are_eagers(memory_format):
    """Code that views the output of a convolution keeps working."""
    x = random_rows(3, 8, 9, 9).contiguous(memory_format=memory_format)
    w = random_rows(5, 8, 3, 3, seed=1)

    def convolve(x):
        out = F.conv2d(x, w)
        return out, out.view(3, 5, 7, 7).permute(0, 2, 3, 1) + 1

    for dynamic in (False, True):
        torch._dynamo.reset()
        for actual, expected in zip(compiled(convolve, dynamic=dynamic)(x), convolve(x), strict=True):
            assert actual.stride() == expected.stride()


def test_stock_convolutions_follow_the_batch():
    """Negative control, on the cases above: the library's algorithm follows the batch for at least one."""
    x, w = random_rows(16, 8, 9, 9), random_rows(8, 8, 3, 3, seed=1)
    changed = {
        name: sum(changed_rows_over_batches(lambda x, f=case: f(x, w), (x,), BATCHES).values())
        for name, case in CASES.items()
    }
    assert any(changed.values()), changed
