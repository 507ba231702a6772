"""The kernels of attention's gradients without a GPU: the composite's bits, their source, what they are compiled to."""

import importlib.util
import itertools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
from attention_gradients import composite_of, fused, operands
from torch.torch_version import TorchVersion

from bi_inductor import BatchInvarianceError, inspect, verifier
from bi_inductor.attention_backward_op import OVERLOAD, attention_backward
from bi_inductor.attention_op import attention
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.offline import compile_offline
from bi_inductor.runtime import attention_backward as kernels
from bi_inductor.templates import triton_attention_backward as templates
from bi_inductor.templates.triton_attention_backward import Schedule
from bi_inductor.testing import same_bits

BF16 = torch.bfloat16
#: Compiling takes minutes: for an A100 with the oldest Triton that is supported alone.
TARGETS = ["sm_90", *(["sm_80"] if TorchVersion(triton.__version__) < "3.7" else [])]


def forced(of_query, of_key=None):
    """Both kernels with a schedule, by default the same one, whatever the tables say."""
    return mock.patch.multiple(
        templates, query_schedule_for=lambda *_: of_query, key_schedule_for=lambda *_: of_key or of_query
    )


# ---------------------------------------------------------------- the sums

SHAPES = {
    # heads, key heads, queries, keys, head dim, value dim: tiles of 16 rows and 32 keys
    "heads that share a tile": (4, 1, 5, 40, 16, 16),
    "one query of each head": (4, 1, 1, 33, 16, 16),
    "whole tiles": (2, 1, 64, 64, 16, 16),
    "head dims that differ": (2, 2, 37, 40, 20, 24),
    "more keys than queries": (2, 1, 30, 90, 16, 16),
    "more queries than keys": (4, 2, 70, 50, 16, 16),
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_composites_bits(name, is_causal):
    inputs = operands(1, *SHAPES[name], BF16)
    with forced(Schedule(16, 32, 1, 1, 1)):
        found = run_in_interpreter(fused(is_causal, 0.3), *inputs)
    expected = run_in_interpreter(composite_of(is_causal, 0.3), *inputs)
    assert all(map(same_bits, found, expected)) and all(x.count_nonzero() for x in expected)


@pytest.mark.parametrize("mask", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_the_composites_bits_under_a_mask(mask, scale):
    inputs = operands(2, 2, 1, 37, 40, 16, 16, torch.float16, mask)
    found = run_in_interpreter(fused(False, scale), *inputs)
    expected = run_in_interpreter(composite_of(False, scale), *inputs)
    assert all(map(same_bits, found, expected))


def test_another_tile_has_the_same_bits_and_another_order_has_not():
    """Teeth: rows of a group position by position, and not head after head, are seen in dk and dv alone."""
    inputs = operands(1, 2, 1, 70, 48, 16, 16, torch.float32)
    expected = run_in_interpreter(fused(True, 0.3), *inputs)
    for schedule in (Schedule(16, 16, 1, 1, 1), Schedule(64, 32, 1, 1, 1)):
        with forced(schedule):
            assert all(map(same_bits, run_in_interpreter(fused(True, 0.3), *inputs), expected))
    swapped = [x if x is None or x.shape[1] == 1 else x.flip(1) for x in inputs]
    of_query, of_key, of_value = run_in_interpreter(fused(True, 0.3), *swapped)
    assert same_bits(of_query.flip(1), expected[0])
    assert not same_bits(of_key, expected[1]) and not same_bits(of_value, expected[2])


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_nothing_to_attend_to(sizes):
    batch, queries, keys = sizes
    inputs = operands(batch, 4, 2, queries, keys, 16, 16, BF16)
    results = run_in_interpreter(fused(False, 0.3), *inputs)
    assert not any(x.count_nonzero() for x in results)
    assert [x.shape for x in results] == [x.shape for x in inputs[1:4]]


# ---------------------------------------------------------------- source and cubins


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def training_graph(fn, *inputs, **options):
    _, graph = inspect(
        fn, *(x.requires_grad_(x.is_floating_point()) for x in inputs), backward=True, **options
    ).graphs
    return graph


def sdpa_inputs(head_dim=64, value_dim=None, dtype=BF16):
    return [
        x.detach().clone() for x in operands(2, 4, 2, 100, 100, head_dim, value_dim or head_dim, dtype)[1:4]
    ]


@pytest.fixture(scope="module")
def emitted():
    boolean = (torch.rand(2, 1, 100, 100) > 0.5,)
    made = {
        "causal": training_graph(causal, *sdpa_inputs(), dynamic=True),
        "mask": training_graph(masked, *sdpa_inputs(80), *boolean),
        "values": training_graph(causal, *sdpa_inputs(32, 48, torch.float32)),
    }
    return {name: (graph.source, graph.certificate) for name, graph in made.items()}


def test_training_is_fused(emitted):
    for source, certificate in emitted.values():
        assert source.count("attention_backward.query_gradients(") == 1
        assert source.count("attention_backward.key_gradients(") == 1
        assert "tl.dot(" not in source
        forms = [
            entry.form
            for entry in certificate.entries
            if entry.op.startswith("bi_inductor.attention_backward")
        ]
        assert forms == ["AttentionGradient(float32)"]
        (entry,) = (entry for entry in certificate.entries if entry.form == forms[0])
        assert entry.level == "verified in source"


def test_a_mask_that_needs_a_gradient_has_all_scores():
    """Its gradient is all of ds."""
    mask = torch.randn(2, 1, 100, 100)
    source = training_graph(masked, *sdpa_inputs(), mask).source
    assert "attention_backward." not in source and source.count("tl.dot(") == 5


def test_one_fingerprint_for_every_batch_and_length():
    graphs = [
        training_graph(causal, *(x[:batch, :, :length].clone() for x in sdpa_inputs()))
        for batch, length in ((1, 7), (2, 70), (2, 100))
    ]
    assert len({graph.certificate.fingerprint for graph in graphs}) == 1


@pytest.mark.parametrize("name", ["causal", "mask", "values"])
def test_emitted_code_is_clean(emitted, name):
    assert verifier.verify(*emitted[name]) == ()


CORRUPTIONS = {
    "other precision": ("causal", r"'ieee'\n", "'tf32'\n"),
    "keys beyond the mask": ("causal", r"last_position \+ 1\)", "last_position + 2)"),
    "rows that do not exist": ("mask", r"idx_m, exists, tiles, scored\)", "idx_m, inside, tiles, scored)"),
    "the span of other keys": ("mask", r"key_tile \* BLOCK_N, KEYS", "key_tile, KEYS"),
    "granules of another size": ("mask", r"GRANULE : tl.constexpr = 16", "GRANULE : tl.constexpr = 32"),
    "keys of another head": (
        "causal",
        r"key_head = program // key_tiles % KEY_HEADS",
        "key_head = program % KEY_HEADS",
    ),
    "queries of another group": ("causal", r"first_head = key_head \* GROUP", "first_head = key_head"),
    "statistics of another row": ("causal", r"DELTA \+ first_row\)", "DELTA)"),
    "tiles of keys that overlap": ("values", r"idx_n = key_tile \* BLOCK_N", "idx_n = key_tile * BLOCK_M"),
    "causal by name only": ("causal", r"CAUSAL : tl.constexpr = True", "CAUSAL : tl.constexpr = False"),
    "one head less": ("causal", r"BLOCK_N, GROUP, QUERIES,", "BLOCK_N, 1, QUERIES,"),
    "a chain that is not finished": ("causal", r"attention_backward\.finish\(dv\)", "(dv + 1)"),
    "no scale": ("causal", r"finish\(dk\) \* tl\.full\(\(\), SCALE, tl\.float32\)", "finish(dk)"),
    "a hidden key in sight": (
        "mask",
        r"mask_strides, idx_n, exists, KEYS, scored\)",
        "mask_strides, idx_n - 1, exists, KEYS, scored)",
    ),
    "another function": (
        "causal",
        r"attention_backward\.query_gradients\(",
        "attention_backward.key_gradients(",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_found(emitted, name):
    base, old, new = CORRUPTIONS[name]
    source, certificate = emitted[base]
    corrupted = re.sub(old, new, source)
    assert corrupted != source, "the corruption changes nothing"
    assert "attention" in {finding.rule for finding in verifier.verify(corrupted, certificate)}


def test_a_sum_beside_the_cores_is_found(emitted):
    source, certificate = emitted["causal"]
    line = "    dv = attention_backward.finish(dv)"
    corrupted = source.replace(line, f"    other = tl.sum(dv, 0)\n{line}")
    assert "reduction" in {finding.rule for finding in verifier.verify(corrupted, certificate)}


def gradient_kernels(*inputs, is_causal=True, scale=0.3, target="sm_90"):
    kernels = inspect(fused(is_causal, scale), *inputs, target=target).kernels
    return {name: text for name, text in kernels.items() if "attention_backward." in text}


#: Every width and dtype for one target, and each target with both dtypes.
COMPILED = [
    (64, BF16, "sm_80"),
    (64, torch.float32, "sm_90"),
    (128, BF16, "sm_90"),
    (128, torch.float32, "sm_80"),
    (256, BF16, "sm_80"),
    (256, torch.float32, "sm_90"),
]


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("width", "dtype", "target"), [case for case in COMPILED if case[2] in TARGETS], ids=str
)
def test_every_schedule_compiles(width, dtype, target):
    """TTGIR is read on the way; a kernel may have 163 KB of shared memory on an A100."""
    of_queries, of_keys = templates.schedules(width, dtype.itemsize)
    for number, (of_query, of_key) in enumerate(itertools.zip_longest(of_queries, of_keys)):
        of_query, of_key = of_query or of_queries[0], of_key or of_keys[0]
        mask = "float32" if number == 0 else None
        inputs = operands(1, 4, 2, 80, 80, width, width, dtype, mask)
        with forced(of_query, of_key):
            scale = 0.3 if mask is None else 1.0
            sources = gradient_kernels(*inputs, is_causal=mask is None, scale=scale, target=target)
        made = compile_offline(sources, target)
        assert len(made) == 2
        for kernel in made:
            assert kernel.shared_bytes <= 163 << 10, str(kernel)


def test_what_may_be_chosen_is_listed():
    for width, itemsize, major in itertools.product((16, 32, 64, 128, 256), (2, 4), (8, 9, 10)):
        of_query, of_key = templates.schedules(width, itemsize)
        for length in (1, 16, 17, 33, 64, 65, 1000, None):
            assert templates.query_schedule_for(length, width, itemsize, major) in of_query
            assert templates.key_schedule_for(length, width, itemsize, major) in of_key


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("target", [target for target in TARGETS if target in ("sm_80", "sm_90")])
def test_nothing_much_spills_under_a_mask(width, target):
    """With the schedules of the tables; others spilled 5 KB a thread on an A100."""
    inputs = operands(1, 4, 2, 80, 80, width, width, BF16, "bool")
    for kernel in compile_offline(gradient_kernels(*inputs, is_causal=False, target=target), target):
        assert kernel.stack_bytes <= 256, str(kernel)


def test_a_mask_that_triton_would_start_a_chain_from_is_refused(monkeypatch, tmp_path):
    """Scale 1 before a mask of floats: without the choice in ``_probabilities`` a score starts from the mask."""
    sources = gradient_kernels(
        *operands(1, 2, 1, 16, 16, 16, 16, BF16, "float32"), is_causal=False, scale=1.0
    )
    text, choice = Path(kernels.__file__).read_text(), "if SCALE == 1.0:"
    assert text.count(choice) == 1
    path = tmp_path / "without_choice.py"
    path.write_text(
        text.replace("from .attention", "from bi_inductor.runtime.attention").replace(
            choice, "if SCALE == 0.0:"
        )
    )
    spec = importlib.util.spec_from_file_location("without_choice", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for core in ("query_gradients", "key_gradients"):
        monkeypatch.setattr(kernels, core, getattr(module, core))
    for name, source in sources.items():
        with pytest.raises(BatchInvarianceError, match="accumulator starts as"):
            compile_offline({name: source}, "sm_90")


# ---------------------------------------------------------------- the op


def test_the_op_and_its_gradients():
    inputs = [x.double() for x in operands(1, 4, 2, 2, 3, 4, 3, torch.float64) if x is not None]
    grad, query, key, value, logsumexp, delta = inputs
    logsumexp = logsumexp.clamp(min=-1)
    options = (True, 0.3, None, None, "", "", [])
    torch.library.opcheck(OVERLOAD, (grad, query, key, value, None, logsumexp, delta, *options))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.autograd.gradgradcheck(lambda *x: attention(*x, None, False, 0.3), leaves)


def test_the_op_maps_to_one_op():
    inputs = [x for x in operands(6, 4, 2, 5, 7, 8, 8, torch.float32) if x is not None]

    def fn(grad, query, key, value, logsumexp, delta):
        return attention_backward(grad, query, key, value, None, logsumexp, delta, True, 0.3)

    mapped = torch.vmap(fn)(*(x.unflatten(0, (2, 3)) for x in inputs))
    assert all(same_bits(x.flatten(0, 1), y) for x, y in zip(mapped, fn(*inputs), strict=True))
