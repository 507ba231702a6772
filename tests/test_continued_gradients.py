"""C7 over micro-batches: with ``continue_gradients`` the gradients of 1, 2, 4 and 8 micro-batches have equal bits."""

import pytest
import torch
import torch.nn.functional as F
from devices import compiled, random_rows
from torch import nn

from bi_inductor import BatchInvarianceError, OptionError, oracle
from bi_inductor.accumulation import ops as accumulation
from bi_inductor.testing import same_bits

CONTINUED = {"batchinv.continue_gradients": True}
ROWS, LENGTH, WIDTH = 64, 8, 24


class Block(nn.Module):
    """Every kind of gradient that can be continued: products, biases, norms, and a parameter without a batch."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH, bias=False)

    def forward(self, x):
        return self.last(x + self.down(F.gelu(self.up(self.norm(x + self.position)))))


def block():
    torch.manual_seed(0)
    return Block()


def loss(output):
    return (output.float() * torch.linspace(-1, 2, output.shape[-1])).sum()


def gradients(model, x, cuts, options, autocast=False):
    """Gradients by name after one backward for each piece of ``x``."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    run = compiled(model, options=options)
    for piece in x.split(cuts):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(piece)
        loss(output).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def changed(a, b):
    return [name for name in a if not same_bits(a[name], b[name])]


@pytest.mark.lengthy
def test_micro_batches_add_up_to_the_whole_batch():
    model, x = block(), random_rows(ROWS, LENGTH, WIDTH)
    whole = gradients(model, x, ROWS, CONTINUED)
    assert not changed(gradients(model, x, [8, 32, 24], CONTINUED), whole)
    # Without the option the pieces are added, which is another order.
    assert "up.weight" in changed(gradients(model, x, ROWS // 4, None), whole)
    model.zero_grad()
    loss(model(x)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            whole[name], parameter.grad, rtol=1e-5, atol=1e-5 * whole[name].abs().max()
        )


@pytest.mark.lengthy
def test_micro_batches_under_autocast():
    """bf16 products; their gradients are not rounded to bf16 between two micro-batches."""
    model, x = block(), random_rows(ROWS, LENGTH, WIDTH)
    whole = gradients(model, x, ROWS, CONTINUED, autocast=True)
    assert not changed(gradients(model, x, ROWS // 4, CONTINUED, autocast=True), whole)


@pytest.mark.lengthy
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution(layout):
    torch.manual_seed(0)
    model = nn.Conv2d(6, 4, 3, padding=1).to(memory_format=layout)
    x = random_rows(16, 6, 8, 8).contiguous(memory_format=layout)
    whole = gradients(model, x, 16, CONTINUED)
    assert not changed(gradients(model, x, 4, CONTINUED), whole)


def test_gradients_are_read_when_the_backward_begins():
    """zero_grad may come between forward and backward, and two forwards before two backwards."""
    model, x = block(), random_rows(ROWS, LENGTH, WIDTH)
    whole = gradients(model, x, ROWS, CONTINUED)
    run = compiled(model, options=CONTINUED)
    loss(run(x[:16])).backward()
    outputs = [run(piece) for piece in x.split(32)]
    model.zero_grad()
    for output in outputs:
        loss(output).backward()
    assert not changed({name: p.grad for name, p in model.named_parameters()}, whole)


@pytest.mark.parametrize("block", [1, 64])
def test_sums_have_their_form(block):
    x, start = random_rows(150, 5), random_rows(5, seed=1)
    fn = compiled(lambda start, x: accumulation.sum_from(start, x, [0], block))
    expected = start
    for rows in x.split(block):
        expected = expected + oracle.tree_sum(rows, 0)
    assert same_bits(fn(start, x), expected)


def test_what_cannot_be_continued_is_refused():
    table = nn.Embedding(10, 4)
    with pytest.raises(BatchInvarianceError, match="continued gradient of a parameter"):
        loss(compiled(table, options=CONTINUED)(torch.arange(6))).backward()
    with pytest.raises(BatchInvarianceError, match="bfloat16 parameter"):
        compiled(nn.Linear(4, 4).bfloat16(), options=CONTINUED)(torch.randn(2, 4).bfloat16())
    with pytest.raises(OptionError, match="True or False"):
        compiled(nn.Linear(4, 4), options={"batchinv.continue_gradients": "yes"})(torch.randn(2, 4))


def test_a_total_is_not_taken_for_a_gradient():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    run = compiled(model, options=CONTINUED)
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(loss(run(x)), [model.weight])
    with pytest.raises(RuntimeError, match="twice in one backward"):
        (loss(run(x)) + loss(run(x))).backward()
    with torch.no_grad():
        assert same_bits(run(x), compiled(model)(x))
