"""C3 and C5: bits do not depend on how, when or for what a graph was compiled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, over_batches, random_rows
from torch.utils.checkpoint import checkpoint

from bi_inductor.decompositions import views
from bi_inductor.passes import canonicalize
from bi_inductor.testing import changed_rows_over_batches, same_bits

ON_A_GPU = [pytest.param(dtype, "cuda", marks=pytest.mark.gpu) for dtype in (torch.float32, torch.bfloat16)]


class Block(torch.nn.Module):
    """A pre-norm transformer block: attention and a gated MLP, as people compile."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.RMSNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        column = x[:, 0, -1:]
        copied = column.contiguous()  # of one row a column is contiguous without a copy
        shift = copied.sin() + copied * 3 + column.cos() + column * 5
        return x + self.down(F.silu(gate) * value) + shift[:, None]


def returned(x, y):
    exponential = y.exp()
    flat = torch.flatten(input=exponential.t())[None]
    return x * 3.1, x.sin(), x.t().reshape(-1), exponential, exponential.sin(), flat


def test_gradients_of_what_is_returned_reshaped_are_added_first(monkeypatch):
    """Of one row, what is returned reshaped would be a view of an input or a result, its gradient added last."""
    values = torch.stack([random_rows(131, 5, seed=seed) for seed in range(8)])

    def gradients(run, rows):
        x, y, *weights = values[:, rows]
        weights = [*weights[:2], weights[2].t().reshape(-1), *weights[3:5], weights[5].t().reshape(1, -1)]
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        torch.autograd.backward(run(*leaves), weights)
        return torch.stack([leaf.grad for leaf in leaves])

    def alone():
        torch._dynamo.reset()
        run = compiled(returned)
        return torch.cat([gradients(run, slice(row, row + 1)) for row in range(131)], 1)

    whole = gradients(compiled(returned), slice(None))
    assert same_bits(alone(), whole)
    monkeypatch.setattr(canonicalize, "copy_returned_views", lambda graph: None)
    assert not any(map(same_bits, alone(), whole))


def repeated(x, y):
    """Views whose gradients are sums: of inputs, and of a result that is returned too."""
    exponential = y.exp()
    return (*views_of(x, y), exponential, exponential[:, None].expand(-1, 9, -1))


def repeated_and_written(x, y):
    """The same, where what is seen several times is written in place, before and after."""
    written = (y * 3.0).neg_()
    result = (*views_of(x, y), written, written[:, None].expand(-1, 9, -1))
    written.add_(x)
    return result


def repeated_in_a_checkpoint(x, y):
    return checkpoint(repeated, x, y, use_reentrant=False)


def views_of(x, y):
    grids = torch.broadcast_tensors(x[:, None], y[:, :, None])
    lifted = torch.vmap(lambda row: row.expand(7, 40))(x)
    return x[:, None].expand(-1, 40, -1), y.unfold(1, 3, 1), *grids, lifted


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("repeated", [repeated, repeated_and_written, repeated_in_a_checkpoint])
def test_gradients_of_what_is_returned_repeated_do_not_depend_on_the_batch(repeated, device, monkeypatch):
    x, y = (random_rows(33, 40, device=device, seed=seed) for seed in range(2))
    weights = [random_rows(*result.shape, device=device, seed=9) for result in repeated(x, y)]

    def gradients(run, rows):
        leaves = [x[rows].clone().requires_grad_(), y[rows].clone().requires_grad_()]
        torch.autograd.backward(run(*leaves), [weight[rows] for weight in weights])
        return [leaf.grad for leaf in leaves]

    def summed(x, y):
        return [
            (result * weight[: len(x)]).sum() for result, weight in zip(repeated(x, y), weights, strict=True)
        ]

    def inside(run):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        torch.autograd.backward(run(*leaves))
        return [leaf.grad for leaf in leaves]

    with torch.no_grad():
        torch.testing.assert_close(compiled(repeated)(x, y), repeated(x, y))
    whole = gradients(compiled(repeated), slice(None))
    torch._dynamo.reset()
    run = compiled(repeated)
    parts = [gradients(run, slice(row, row + 3)) for row in range(0, 33, 3)]
    assert all(
        same_bits(torch.cat(part), rows) for part, rows in zip(zip(*parts, strict=True), whole, strict=True)
    )
    assert all(map(same_bits, inside(compiled(summed)), whole))
    monkeypatch.setattr(canonicalize, "copy_returned_views", lambda graph: None)
    torch._dynamo.reset()
    assert not all(map(same_bits, gradients(compiled(repeated), slice(None)), whole))


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_gradients_have_one_sign_where_rows_are_taken_one_by_one(device, monkeypatch):
    """Of two rows autograd adds zeros to the gradient of either, of one it adds nothing."""

    def one_by_one(x):
        numbers = range(len(x))
        return torch.stack([(x[i] * -3.0).relu() for i in numbers]), torch.cat(
            [(x[i : i + 1] * -3.0).relu() for i in numbers]
        )

    x, upstream = (random_rows(3, 40, device=device, seed=seed) for seed in range(2))

    def gradient(rows, number):
        leaf = x[rows].clone().requires_grad_()
        torch._dynamo.reset()
        result = compiled(one_by_one, dynamic=False)(leaf)[number]
        return torch.autograd.grad(result, leaf, upstream[rows])[0]

    for number in range(2):
        alone = torch.cat([gradient(slice(row, row + 1), number) for row in range(3)])
        assert same_bits(alone, gradient(slice(None), number))
    monkeypatch.setattr(views, "TABLE", {})
    with torch._inductor.config.patch(force_disable_caches=True):
        assert not same_bits(gradient(slice(0, 1), 0), gradient(slice(None), 0)[:1])


def block(device, dtype):
    torch.manual_seed(0)
    return Block().to(device, dtype)


@pytest.mark.lengthy
@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), *ON_A_GPU])
def test_every_history_gives_the_same_bits(device, dtype):
    model, x = block(device, dtype), random_rows(9, 11, 32, device=device, dtype=dtype)
    results = {}
    with torch.no_grad():
        for name, first, dynamic in [
            ("static", 9, False),
            ("dynamic", 9, True),
            ("small first", 2, None),
            ("one first", 1, None),
        ]:
            torch._dynamo.reset()
            fn = compiled(model, dynamic=dynamic)
            whole = fn(x[:first])
            results[name] = torch.cat([fn(x[:1]), fn(x[1:])])
            assert same_bits(whole, results[name][:first]), name
    for name, result in results.items():
        assert same_bits(result, results["static"]), name


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), *ON_A_GPU])
def test_training_forward_equals_inference(device, dtype):
    model, x = block(device, dtype), random_rows(5, 11, 32, device=device, dtype=dtype)
    with torch.no_grad():
        inference = compiled(model)(x)
    torch._dynamo.reset()
    training = compiled(model)(x.requires_grad_(True))
    assert training.requires_grad and same_bits(training, inference)
    torch._dynamo.reset()
    checkpointed = compiled(lambda x: checkpoint(model, x, use_reentrant=False))(x)
    assert same_bits(checkpointed, inference)


@pytest.mark.lengthy
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), *ON_A_GPU])
def test_input_gradients_do_not_depend_on_the_batch(device, dtype):
    model = over_batches(block(device, dtype))

    def gradients(x):
        x = x.clone().requires_grad_(True)
        model(x).float().square().sum().backward()
        return x.grad

    x = random_rows(9, 11, 32, device=device, dtype=dtype)
    changed = changed_rows_over_batches(gradients, [x], [1, 3, 9])
    assert not any(changed.values()), changed


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_weight_gradients_are_the_same_from_run_to_run(device):
    def run():
        torch._dynamo.reset()
        model = block(device, torch.float32)
        compiled(model)(random_rows(9, 11, 32, device=device)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for a, b in zip(run(), run(), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_do_not_change_bits(mode, device):
    model, x = block(device, torch.float32), random_rows(5, 11, 32, device=device)
    with torch.no_grad():
        expected = compiled(model)(x).clone()
        torch._dynamo.reset()
        assert same_bits(compiled(model, mode=mode)(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_division_by_a_length_is_a_division(device):
    """Static graphs see a constant divisor, dynamic ones a symbol."""
    x = random_rows(64, 1000, device=device)

    def fn(x):
        return x / x.shape[-1], x.mean(-1), x * (1 / x.shape[-1])

    static = compiled(fn, dynamic=False)(x)
    torch._dynamo.reset()
    for a, b in zip(static, compiled(fn, dynamic=True)(x), strict=True):
        assert same_bits(a, b)
    # A tensor as divisor: eager multiplies by 1 / 1000 on CUDA when the divisor is a number.
    assert same_bits(static[0], x / torch.full_like(x, 1000))


def test_a_warning_comes_before_dynamo_runs_eagerly():
    def fn(x):
        return x.sum(-1)

    with torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False):
        run = compiled(fn)
        run(torch.ones(2, 2))
        with pytest.warns(UserWarning, match="not batch-invariant"):
            run(torch.ones(2, 3))
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(
            recompile_limit=2, automatic_dynamic_shapes=False, fail_on_recompile_limit_hit=True
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", UserWarning)
        run = compiled(fn)
        run(torch.ones(2, 2))
        run(torch.ones(2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dynamic_length_is_not_rounded(device, dtype):
    """3001 is no bf16 number: the gradient of a mean, and a quotient, are the same static and dynamic."""

    def f(x):
        return x.mean(-1), x / x.shape[-1], x * x.shape[-1]

    results = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        x = random_rows(2, 3001, dtype=dtype, device=device).requires_grad_()
        outputs = compiled(f, dynamic=dynamic)(x)
        (gradient,) = torch.autograd.grad(outputs[0], x, torch.full_like(outputs[0], 1.3))
        results.append((*outputs, gradient))
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("device", DEVICES)
def test_products_and_sums_with_zero_are_computed(device):
    """Stock takes x + 0 for x, and until torch 2.13 x * 0 for 0.0, where it sees all sizes: dynamic ones hide them."""
    x = torch.tensor([[-1.0, -0.0, 2.0]] * 3, device=device)

    def neutral(x):
        return x * 0, x + torch.zeros_like(x)

    for dynamic in (False, True):
        torch._dynamo.reset()
        assert all(map(same_bits, compiled(neutral, dynamic=dynamic)(x), neutral(x)))
    stock = torch.compile(neutral, backend="inductor")(x)
    assert not same_bits(stock[1], neutral(x)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_static_and_dynamic_lengths_have_one_order(device):
    """A short static sum is written out, a dynamic one is a loop, 1 is specialised."""

    def fn(x):
        low = x.bfloat16()
        return x.sum(-1), x.softmax(-1), x.std(-1, correction=0), low.sum(-1), low.prod(-1)

    rows = [random_rows(4, length, device=device) for length in (1, 2, 7, 8, 33)]
    static = compiled(lambda *xs: [fn(x) for x in xs], dynamic=False)(*rows)
    torch._dynamo.reset()
    dynamic = compiled(fn, dynamic=True)
    for x, expected in zip(rows, static, strict=True):
        assert all(map(same_bits, dynamic(x), expected)), x.shape


@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_module_and_inference_mode(device):
    model, x = block(device, torch.float32), random_rows(5, 11, 32, device=device)
    with torch.no_grad():
        expected = compiled(model)(x)
        batch = {"x": {0: torch.export.Dim("rows", min=1)}}
        exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
        torch._dynamo.reset()
        assert same_bits(compiled(exported)(x), expected)
    with torch.inference_mode():
        torch._dynamo.reset()
        assert same_bits(compiled(model)(x), expected)


def test_a_graph_break_is_reported_once():
    def fn(x):
        x = x + 1
        torch._dynamo.graph_break()  # the user's line
        return x * 2

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            compiled(fn)(torch.ones(3))
        compiled(lambda x: x + 1, fullgraph=True)(torch.ones(3))
    (message,) = [str(w.message) for w in caught if "graph break" in str(w.message)]
    assert "the user's line" in message and "test_histories.py" in message
