"""Writes to computed places: contributions in source order as a tree, the last one where they overwrite."""

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES, compiled, over_batches, random_rows

import bi_inductor
from bi_inductor import oracle
from bi_inductor.decompositions import scatter
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.testing import same_bits

aten = torch.ops.aten


def rows_to(places, count, device="cpu", seed=1):
    """Destinations in which a few places receive most of the rows."""
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(count, generator=generator) ** 3 * places
    return skewed.long().to(device)


def add_rows(base, rows, values):
    return base.index_add(0, rows, values)


@pytest.mark.lengthy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_sums_equal_the_oracle(device, dtype):
    """One row, all to one place, no power of two, more levels than one kernel computes; static and dynamic."""
    base = random_rows(7, 5, dtype=dtype, device=device)
    for dynamic in (False, True):
        call = compiled(add_rows, dynamic=dynamic)
        for count, places in ((1, 7), (9, 1), (1025, 7)):
            torch._dynamo.reset()
            rows = rows_to(places, count, device)
            values = random_rows(count, 5, dtype=dtype, device=device, seed=count)
            expected = oracle.scatter_sum(base, rows, values).to(dtype)
            assert same_bits(call(base, rows, values), expected), (dynamic, count)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_all_spellings_of_a_sum_are_one(device):
    base, rows = random_rows(7, 5, device=device), rows_to(7, 60, device)
    values = random_rows(60, 5, device=device, seed=2)
    wide = rows[:, None].expand(60, 5)

    def spellings(base, rows, values, wide):
        return (
            base.index_add(0, rows, values),
            base.index_put((rows,), values, accumulate=True),
            base.index_put((rows - 7,), values, accumulate=True),
            base.scatter_add(0, wide, values),
            base.scatter_reduce(0, wide, values, "sum"),
            base.t().index_add(1, rows, values.t()).t(),
        )

    expected = oracle.scatter_sum(base, rows, values)
    for result in compiled(spellings)(base, rows, values, wide):
        assert same_bits(result.contiguous(), expected)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_see_the_batch(device):
    """Each row scatters within itself: the gradient of take_along_dim, at every batch size and slot."""

    def within_rows(values, places):
        return torch.zeros_like(values[:, :6]).scatter_add(1, places, values)

    values = random_rows(16, 40, device=device)
    places = torch.stack([rows_to(6, 40, device, seed=seed) for seed in range(16)])
    bi_inductor.assert_batch_invariant(over_batches(within_rows), values, places, batches=(1, 2, 7, 16))


@pytest.mark.lengthy
@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin", "mean"])
def test_scatter_reduce_equals_eager_where_the_order_cannot_matter(reduce):
    """Powers of two (prod), small integers (the others): every order gives the exact result."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 9, (6, 40), generator=generator)
    source = 2.0 ** torch.randint(-1, 2, (6, 40), generator=generator)
    source = source * torch.where(torch.rand(6, 40, generator=generator) < 0.5, -1, 1)
    base = torch.full((6, 9), 4.0)

    def both(base, index, source):
        return [base.scatter_reduce(1, index, source, reduce, include_self=inc) for inc in (True, False)]

    for actual, expected in zip(compiled(both)(base, index, source), both(base, index, source), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_of_several_writers_wins(device):
    base, rows = random_rows(7, 5, device=device), rows_to(6, 300, device)
    values = random_rows(300, 5, device=device, seed=2)

    def writes(base, rows, values):
        wide = rows[:, None].expand(300, 5)
        return (
            base.index_put((rows,), values),
            base.index_copy(0, rows, values),
            base.scatter(0, wide, values),
        )

    expected = base.clone()
    for row, value in zip(rows.tolist(), values, strict=True):
        expected[row] = value
    for result in compiled(writes)(base, rows, values):
        assert same_bits(result, expected)


INDICES = {
    "two dims": lambda i, j: (i, j),
    "broadcast": lambda i, j: (i[:, None], j[:3]),
    "after a slice": lambda i, j: (None, i, j),
    "apart": lambda i, j: (i, None, j),
    "negative": lambda i, j: (i - 4, j),
    "one element": lambda i, j: (i[:1], j[0]),
}


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("name", INDICES)
def test_every_form_of_indices_means_what_eager_means(name, accumulate):
    """Small integers, so that eager's sums are exact; one value for equal places, so that its writes are too."""
    i, j = torch.tensor([0, 3, 3, 1, 0, 3]), torch.tensor([1, 2, 2, 0, 1, 3])
    base = torch.arange(4 * 4 * 4.0).reshape(4, 4, 4)
    shape = base[tuple(slice(None) if x is None else x for x in INDICES[name](i, j))].shape
    values = torch.full(shape, 5.0) if not accumulate else torch.arange(float(shape.numel())).reshape(shape)

    def put(base, i, j, values):
        return aten.index_put(base, INDICES[name](i, j), values, accumulate)

    assert same_bits(compiled(put)(base, i, j, values), put(base, i, j, values))


def test_a_mask_with_one_value_is_a_where():
    x = random_rows(6, 5)

    assert same_bits(
        compiled(lambda x: x.index_put((x > 0,), x.new_tensor(3.0)))(x), x.masked_fill(x > 0, 3.0)
    )


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_an_embedding(device):
    """The tree over the tokens of each word, in the order of the text; padding and frequencies as in eager."""
    weight = random_rows(11, 6, device=device).requires_grad_()
    tokens = rows_to(11, 90, device).reshape(3, 30)
    upstream = random_rows(3, 30, 6, device=device, seed=3)

    def gradient(**how):
        torch._dynamo.reset()
        compiled(lambda w, t: F.embedding(t, w, **how))(weight, tokens).backward(upstream)
        result, weight.grad = weight.grad, None
        return result

    flat, rows = upstream.reshape(-1, 6), tokens.flatten()
    expected = oracle.scatter_sum(torch.zeros_like(weight), rows, flat)
    assert same_bits(gradient(), expected)
    padded = gradient(padding_idx=2)
    assert same_bits(padded, expected.index_fill(0, torch.tensor(2, device=device), 0.0))
    counts = rows.bincount(minlength=11)
    scaled = oracle.scatter_sum(torch.zeros_like(weight), rows, flat / counts[rows][:, None])
    assert same_bits(gradient(scale_grad_by_freq=True), scaled)
    tokens, upstream = tokens[:0], upstream[:0]
    assert same_bits(gradient(scale_grad_by_freq=True), torch.zeros_like(weight))


def language_model(device):
    """A model, its loss as a function of tokens, and tokens."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 16), torch.nn.RMSNorm(16), torch.nn.Linear(16, 50, bias=False)
    ).to(device)

    def loss(tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss, rows_to(50, 66, device).reshape(2, 33)


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_a_language_model_trains(device):
    """Two compiles, one static and one dynamic, give the same weight gradients."""
    model, loss, tokens = language_model(device)
    gradients = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        compiled(loss, dynamic=dynamic)(tokens).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(same_bits, *gradients))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.lengthy
def test_a_language_model_of_any_length_is_generated_for_a_gpu():
    """Its norm has batch * (length - 1) rows, which torch writes in two ways; torch 2.11 takes them for two sizes."""
    _, loss, tokens = language_model("cpu")
    found = bi_inductor.inspect(loss, tokens, target="sm_90", dynamic=True, backward=True)
    assert [graph.is_backward for graph in found.graphs] == [False, True]
    (norm,) = (text for text in found.graphs[0].kernels.values() if "rsqrt(" in text)
    assert "ordered.tree_sum(" in norm and "ks0" in norm


def test_the_fingerprint_does_not_follow_the_number_of_rows():
    prints = {
        bi_inductor.inspect(
            lambda b, i, v: (b.index_add(0, i, v), b.index_put((i,), v), v.cumsum(1)),
            random_rows(7, 5),
            rows_to(7, count),
            random_rows(count, 5),
            target="cpu",
        ).fingerprint
        for count in (1, 3, 300)
    }
    assert len(prints) == 1


def test_the_fingerprint_does_not_follow_a_batch_behind_the_gathered_dim():
    def gathered(x):
        return x.gather(0, x.argmax(0, keepdim=True)).exp()

    made = [
        bi_inductor.inspect(gathered, random_rows(3, batch, 5).requires_grad_(), backward=True)
        for batch in (1, 131)
    ]
    assert made[0].fingerprint == made[1].fingerprint


def test_the_triton_kernels_have_the_oracles_bits():
    rows, values = rows_to(7, 300), random_rows(300, 6)
    base = random_rows(7, 6, seed=4)
    assert same_bits(run_in_interpreter(add_rows, base, rows, values), oracle.scatter_sum(base, rows, values))


def test_without_equal_stores_the_order_of_stores_shows(monkeypatch):
    """Negative control: with every contribution stored as it is, the sum is lost, and the oracle says so."""
    base, rows, values = random_rows(7, 5), rows_to(7, 60), random_rows(60, 5, seed=2)
    expected = oracle.scatter_sum(base, rows, values)
    assert same_bits(compiled(add_rows)(base, rows, values), expected)
    put_rows = scatter.put_rows
    monkeypatch.setattr(scatter, "put_rows", lambda *a, **how: put_rows(*a, **{**how, "distinct": True}))
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert not same_bits(compiled(lambda *a: add_rows(*a))(base, rows, values), expected)


def test_a_constant_can_be_counted():
    """Ones of integers, which are never in memory: torch 2.11 has no C++ for such a value behind a mask."""
    places = rows_to(9, 500)
    count = compiled(lambda i: torch.zeros(9, dtype=torch.int64).scatter_add(0, i, torch.ones_like(i)))(
        places
    )
    assert torch.equal(count, places.bincount(minlength=9))
