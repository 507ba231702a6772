"""C5 and C7: what a partitioner saves, autocast, checkpoints and the grouping of an optimizer change no bit."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, random_rows
from torch.utils.checkpoint import checkpoint

from bi_inductor.testing import same_bits


class Layer(torch.nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, 48), torch.nn.Linear(48, width)

    def forward(self, x):
        y = self.norm(x)
        attended = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        return x + self.down(F.gelu(self.up(attended))).softmax(-1) * y


def layer(device):
    torch.manual_seed(0)
    return Layer().to(device)


def trained(model, x, fn, **autocast):
    """Output, input gradient and parameter gradients of one step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, **autocast):
        output = fn(x)
    output.backward(torch.linspace(-1, 2, output.numel(), device=x.device).view_as(output).to(output.dtype))
    return [output.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("autocast", "device"),
    [(True, "cpu"), *(pytest.param(on, "cuda", marks=pytest.mark.gpu) for on in (False, True))],
)
def test_what_is_saved_changes_nothing(device, autocast):
    model, x = layer(device), random_rows(9, 7, 24, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        inference = compiled(model)(x)
    results = {}
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            results[budget] = trained(model, x, compiled(model), enabled=autocast)
    torch._dynamo.reset()
    recomputed = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    results["checkpoint"] = trained(model, x, recomputed, enabled=autocast)
    assert same_bits(results[1.0][0], inference)
    for name, result in results.items():
        assert all(map(same_bits, result, results[1.0])), name


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_equals_its_pieces(device):
    """Whole, and each op compiled for itself with eager autograd between them."""
    model, x = layer(device), random_rows(9, 7, 24, device=device)
    attend = compiled(lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True))
    norm, up, down = compiled(model.norm), compiled(model.up), compiled(model.down)
    gelu, softmax = compiled(F.gelu), compiled(lambda y: y.softmax(-1))

    def pieces(x):
        y = norm(x)
        return x + softmax(down(gelu(up(attend(y))))) * y

    whole = trained(model, x, compiled(model), enabled=False)
    assert same_bits(trained(model, x, pieces, enabled=False)[0], whole[0])


OPTIMIZERS = {
    "adamw": lambda parameters, **how: torch.optim.AdamW(parameters, lr=0.01, **how),
    "sgd": lambda parameters, **how: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, **how),
}


@pytest.mark.lengthy
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_do_not_depend_on_grouping(name, foreach):
    """All parameters in one graph, and each in a graph of its own. (The two loops of torch.optim differ by formula.)"""
    shapes = [(5, 24), (24,), (1,), (3, 7, 11)]

    def run(grouped):
        torch._dynamo.reset()
        parameters = [torch.nn.Parameter(random_rows(*s, seed=i)) for i, s in enumerate(shapes)]
        for group in [parameters] if grouped else [[parameter] for parameter in parameters]:
            optimizer = OPTIMIZERS[name](group, foreach=foreach)
            step = compiled(optimizer.step)
            for number in range(3):
                for parameter in group:
                    parameter.grad = random_rows(*parameter.shape, seed=number)
                step()
        return [parameter.detach() for parameter in parameters]

    assert all(map(same_bits, run(grouped=False), run(grouped=True)))


def test_list_ops_are_their_single_ops():
    """Stock rounds addcmul and lerp of lists in other places than those of tensors."""
    a, b, c = ([random_rows(33, seed=i), random_rows(4, 5, seed=i)] for i in range(3))

    def lists(a, b, c):
        moved = torch._foreach_lerp(torch._foreach_addcmul(a, b, c, 0.3), b, 0.1)
        return moved, torch._foreach_norm(moved)

    def singles(a, b, c):
        moved = [
            torch.lerp(torch.addcmul(x, y, z, value=0.3), y, 0.1) for x, y, z in zip(a, b, c, strict=True)
        ]
        return moved, [torch.linalg.vector_norm(m) for m in moved]

    leaves = torch.utils._pytree.tree_leaves
    results = leaves(compiled(lists)(a, b, c)), leaves(compiled(singles)(a, b, c))
    assert all(map(same_bits, *results)) and len(results[0]) == 4
