"""scaled_dot_product_attention: correct for every argument, and a query row that depends on itself alone."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import TOLERANCE, assert_accurate
from devices import DEVICES, compiled, random_rows
from tracing import computing_targets, traced

from bi_inductor.errors import BatchInvarianceError
from bi_inductor.ops import bmm_rounding, bmm_wide
from bi_inductor.passes.attention import scaled_dot_product_attention
from bi_inductor.passes.canonicalize import canonicalize
from bi_inductor.testing import same_bits

DTYPES = list(TOLERANCE)

#: name: (query, key, value) shapes.
SHAPES = {
    "no leading dims": ((5, 8), (7, 8), (7, 8)),
    "3-D": ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "5-D": ((2, 1, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
    "value dim differs": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "one query": ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "one key": ((2, 3, 5, 8), (2, 3, 1, 8), (2, 3, 1, 8)),
    "broadcast batch": ((1, 3, 5, 8), (4, 3, 7, 8), (4, 1, 7, 8)),
    "no query": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "no key": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
}
GROUPED = {
    "groups of 3": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "one kv head": ((2, 6, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "key and value heads differ": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8)),
    "3-D": ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
}
MASKS = [(5, 7), (7,), (1, 7), (5, 1), (2, 1, 5, 7), (1, 3, 1, 7), (2, 3, 5, 7)]


def operands(shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def exact(query, key, value, attn_mask=None, **arguments):
    """Eager's own math in fp64."""
    mask = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        doubles = [x.double() for x in (query, key, value)]
        return F.scaled_dot_product_attention(*doubles, attn_mask=mask, **arguments)


def check(shapes, dtype=torch.float32, **arguments):
    inputs = operands(shapes, dtype)
    result = scaled_dot_product_attention(*inputs, **arguments)
    assert result.dtype == dtype
    assert_accurate(result, exact(*inputs, **arguments))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, causal):
    check(SHAPES[name], is_causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads(name, causal):
    check(GROUPED[name], is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -0.5, 0.0])
def test_scale(scale):
    check(SHAPES["4-D"], scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [((2, 3, 40, 64), (2, 3, 100, 64), (2, 3, 100, 64))], ids=["40x100x64"])
def test_accuracy(shapes, dtype):
    check(shapes, dtype)
    check(shapes, dtype, is_causal=True)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_boolean_masks(shape):
    mask = torch.rand(shape) > 0.4
    check(SHAPES["4-D"], attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_float_masks(shape, dtype):
    mask = torch.randn(shape).masked_fill(torch.rand(shape) > 0.7, -torch.inf)
    check(SHAPES["4-D"], dtype, attn_mask=mask.to(dtype))


@pytest.mark.parametrize("name", GROUPED)
def test_masks_and_grouped_heads(name):
    query, key, _ = GROUPED[name]
    mask = torch.rand(*query[:-1], key[-2]) > 0.4
    check(GROUPED[name], attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float", "scores"])
def test_a_row_without_any_key_is_zero_and_so_is_its_gradient(kind):
    """As eager: 0, not NaN, whether a mask or the scores themselves are -inf."""
    query, key, value = [x.requires_grad_() for x in operands(SHAPES["4-D"])]
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(5, 7).masked_fill(~mask, -torch.inf)
    if kind == "scores":
        mask, key = None, torch.full_like(key, -torch.inf)
        query = query.detach().abs().requires_grad_()
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(result[:, :, 1], torch.zeros_like(result[:, :, 1]))
    assert torch.equal(expected[:, :, 1], torch.zeros_like(result[:, :, 1]))
    if kind != "scores":
        result.sum().backward()
        assert not query.grad.isnan().any() and not query.grad[:, :, 1].any()


def test_nan_and_infinity_stay_in_their_rows():
    query, key, value = operands(SHAPES["4-D"])
    clean = scaled_dot_product_attention(query, key, value)
    query[0, 0, 1], query[1, 2, 3] = torch.nan, torch.inf
    dirty = scaled_dot_product_attention(query, key, value)
    touched = torch.zeros(2, 3, 5, dtype=torch.bool)
    touched[0, 0, 1] = touched[1, 2, 3] = True
    assert dirty[touched].isnan().all()
    torch.testing.assert_close(dirty[~touched], clean[~touched])


@pytest.mark.parametrize("mask_kind", [None, "float", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, mask_kind):
    shapes = ((2, 6, 5, 16), (2, 2, 7, 16), (2, 2, 7, 12))
    inputs = operands(shapes, dtype)
    arguments = {"enable_gqa": True, "is_causal": mask_kind == "causal"}
    if mask_kind == "float":
        inputs.append(torch.randn(6, 1, 7).to(dtype))
    ours = [x.clone().requires_grad_() for x in inputs]
    reference = [x.double().requires_grad_() for x in inputs]
    weights = torch.randn(2, 6, 5, 12, dtype=torch.float64)
    (scaled_dot_product_attention(*ours, **arguments).double() * weights).sum().backward()
    (exact(*reference, **arguments) * weights).sum().backward()
    for a, b in zip(ours, reference, strict=True):
        assert_accurate(a.grad, b.grad, slack=4)


def test_gradients_of_gradients():
    inputs = [x.requires_grad_() for x in operands(((1, 2, 3, 4),) * 3, torch.float64)]
    torch.autograd.gradgradcheck(scaled_dot_product_attention, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtype(dtype):
    inputs = operands(SHAPES["4-D"])
    with torch.autocast("cpu", dtype=dtype):
        result = scaled_dot_product_attention(*inputs, attn_mask=torch.randn(5, 7))
        assert result.dtype == F.scaled_dot_product_attention(*inputs).dtype == dtype


def test_vmap():
    query, key, value = operands(((4, 2, 3, 5, 8), (2, 4, 3, 7, 8), (2, 3, 7, 8)))
    result = torch.vmap(scaled_dot_product_attention, in_dims=(0, 1, None))(query, key, value)
    torch.testing.assert_close(result, scaled_dot_product_attention(query, key.movedim(1, 0), value))


def test_bmm_wide():
    a, b = operands(((3, 5, 40), (3, 40, 7)), torch.bfloat16)
    result = bmm_wide(a, b)
    assert result.dtype == torch.float32
    assert_accurate(result, a.double() @ b.double())
    torch.library.opcheck(bmm_wide, (a.requires_grad_(), b.requires_grad_()))


def test_bmm_rounding_keeps_the_gradient_wide():
    a, b = operands(((3, 5, 40), (3, 40, 7)))
    a, b = a.requires_grad_(), b.to(torch.bfloat16).requires_grad_()
    torch.library.opcheck(bmm_rounding, (a, b))
    weights = torch.randn(3, 5, 7).to(torch.bfloat16)
    bmm_rounding(a, b).backward(weights)
    torch.testing.assert_close(a.grad, weights.float() @ b.float().mT)
    assert not torch.equal(a.grad, a.grad.to(torch.bfloat16).float())


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def test_the_graph_is_the_same_for_every_batch_and_length():
    graphs = set()
    for batch, queries, keys in itertools.product((1, 2, 7), (1, 5), (1, 7)):
        inputs = operands(((batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 8)))
        grouped = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
        forward, backward = traced(grouped, *(x.requires_grad_() for x in inputs))
        graphs.add((tuple(computing_targets(forward)), tuple(computing_targets(backward))))
    assert len(graphs) == 1
    ((forward, backward),) = graphs
    assert forward.count("bi_inductor.bmm_wide.default") == 1 and forward.count("aten.bmm.default") == 1
    assert not any("scaled_dot_product" in op for op in forward + backward)


def test_a_mapped_product_is_one_product():
    (graph,) = traced(torch.vmap(causal), *operands(((4, 2, 3, 5, 8),) * 3))
    assert computing_targets(graph).count("bi_inductor.bmm_wide.default") == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_users_line_survives(dynamic):
    def fn(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)  # the user's line

    (graph,) = traced(fn, *operands(SHAPES["4-D"]), dynamic=dynamic)
    ops = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert ops and all("# the user's line" in node.meta["stack_trace"] for node in ops)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    graph = torch.fx.symbolic_trace(lambda q: F.scaled_dot_product_attention(q, q, q))
    next(iter(graph.graph.nodes)).meta["example_value"] = nested
    with pytest.raises(BatchInvarianceError, match="jagged"):
        canonicalize(graph)


def test_a_batch_may_stand_where_heads_do():
    """Its size stays a symbol; only with grouped heads is the third last dim known to be heads."""
    x = torch.randn(6, 9, 16)
    torch._dynamo.mark_dynamic(x, 0)  # an error if it became a number
    fn = compiled(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]))
    assert_accurate(fn(x), exact(x[None], x[None], x[None]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_row_depends_on_itself_alone(device):
    """Alone or among others (C1, C4), in chunks, and in any batch."""
    q, k, v = (torch.randn(5, 4, 40, 32).to(torch.bfloat16).to(device) for _ in range(3))
    k, v = (x[:, :2].contiguous() for x in (k, v))
    fn = compiled(functools.partial(F.scaled_dot_product_attention, enable_gqa=True), dynamic=True)
    whole = fn(q, k, v)
    assert_accurate(whole, exact(q, k, v, enable_gqa=True))
    for rows in (slice(7, 8), slice(0, 2), slice(3, 40)):
        assert same_bits(fn(q[:, :, rows].clone(), k, v), whole[:, :, rows])
    for batch in (slice(2, 3), slice(1, 4)):
        assert same_bits(fn(*(x[batch].clone() for x in (q, k, v))), whole[batch])


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_gives_the_bits_of_prefill(device):
    """C4: row t of a causal prefill is query t over the keys up to t."""
    q, k, v = (torch.randn(2, 3, 40, 16).to(device) for _ in range(3))
    prefill = compiled(causal, dynamic=True)(q, k, v)
    decode = compiled(F.scaled_dot_product_attention, dynamic=True)
    for t in (1, 2, 7, 8, 31, 32, 33, 39):
        row = decode(q[:, :, t : t + 1], *(x[:, :, : t + 1].clone() for x in (k, v)))
        assert same_bits(row, prefill[:, :, t : t + 1]), t


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_computed_beside_attention_is_computed(device):
    """Few queries of unknown number: on a GPU the kernel of many is launched without a program."""
    x = torch.randn(5, 3, 16).to(device)
    fn = compiled(lambda x: (F.scaled_dot_product_attention(x, x, x), x.clamp(-2, 1)), dynamic=True)
    attended, clamped = fn(x)
    assert_accurate(attended, exact(x, x, x))
    assert same_bits(clamped, x.clamp(-2, 1))


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_keys_at_the_tail_change_no_bit(kind, device):
    """C6, whatever the hidden keys and values hold that is finite."""
    q, k, v = (random_rows(2, 3, 9, 16, device=device, seed=i) for i in range(3))

    def attend(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def mask(padding):
        visible = (torch.arange(9 + padding, device=device) < 9).unsqueeze(0)
        return (
            visible
            if kind == "bool"
            else torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
        )

    fn = compiled(attend, dynamic=True)
    expected = fn(q, k, v, mask(0))
    for padding in (1, 7, 8, 55, 56, 300):
        tail = random_rows(2, 3, padding, 16, device=device, seed=9, scale=1e3)
        padded = [torch.cat([x, tail], dim=2) for x in (k, v)]
        assert same_bits(fn(q, *padded, mask(padding)), expected), padding


@pytest.mark.lengthy
@pytest.mark.parametrize("device", DEVICES)
def test_training_and_inference_agree_and_input_gradients_ignore_the_batch(device):
    """C5 and C7."""
    inputs = [random_rows(3, 2, 10, 16, device=device, seed=i, scale=0.5) for i in range(3)]
    fn = compiled(causal, dynamic=False)
    with torch.no_grad():
        inference = fn(*inputs)

    def gradients(batch):
        leaves = [x[batch].clone().requires_grad_() for x in inputs]
        result = fn(*leaves)
        result.square().sum().backward()
        return [result.detach(), *(x.grad for x in leaves)]

    together = gradients(slice(0, 3))
    assert same_bits(together[0], inference)
    for a, b in zip(gradients(slice(1, 2)), together, strict=True):
        assert same_bits(a, b[1:2])
