"""The certificate: it says no more than was checked, is equal for every batch, and parts where numerics do."""

import dataclasses
import json
import logging
from importlib import resources

import jsonschema
import pytest
import sympy
import torch
import torch.nn.functional as F
from inspected import WIDTH, Block
from torch import nn
from torch._inductor.exc import InductorError
from transformers import LlamaConfig, LlamaForCausalLM

import bi_inductor
import bi_inductor.attest
from bi_inductor import Certification, certify, contract, entries, inspect, verdicts
from bi_inductor.certificate import Certificate, Level
from bi_inductor.errors import BatchInvarianceError

SCHEMA = json.loads(resources.files("bi_inductor").joinpath("certificate.schema.json").read_text())


def certificate(fn, *args, **options):
    """The certificate of a function that is one graph."""
    (made,) = inspect(fn, *args, **options).certificates
    return made


@pytest.fixture(scope="module")
def block():
    torch._dynamo.reset()
    return certify(Block(), torch.randn(3, WIDTH))


def test_a_document_validates_and_comes_back(block):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    document = json.loads(block.to_json())
    jsonschema.validate(document, SCHEMA)
    assert Certification.from_json(block.to_json()) == block
    (made,) = block.certificates
    assert Certificate.from_json(made.to_json()) == made


@pytest.mark.parametrize("change", ["level", "verdict", "extra"])
def test_the_schema_has_teeth(block, change):
    document = json.loads(block.to_json())
    entry = document["certificates"][0]["entries"][0]
    entry[change] = "certainly"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_a_changed_document_is_not_taken(block):
    document = json.loads(block.to_json())
    entry = next(entry for entry in document["certificates"][0]["entries"] if entry["form"])
    entry["form"] = "Tree(float32, sum, 65)"
    with pytest.raises(ValueError, match="fingerprint or digest"):
        Certification.from_json(json.dumps(document))
    with pytest.raises(ValueError, match="another version"):
        Certificate.from_json('{"schema": 1}')
    with pytest.raises(ValueError, match="no certification"):
        Certification.from_json("{}")


def test_kernels_name_their_ops_forms_schedules_and_lines(block):
    (made,) = block.certificates
    names = {entry.name for entry in made.entries}
    assert len(made.kernels) >= 4
    for kernel in made.kernels:
        assert set(kernel.ops) <= names and kernel.ops and kernel.schedule and kernel.language == "triton"
        assert all("inspected.py:" in source for source in kernel.sources)
    templates = [kernel for kernel in made.kernels if kernel.schedule[0] == "template"]
    assert [kernel.retraced for kernel in templates] == [("chain",), ("chain",)]
    assert {part.split()[0] for part in templates[0].schedule} >= {"BLOCK_M", "BLOCK_K", "num_warps"}
    assert "kernel triton_" in str(block) and "persistent reduction" in str(block)


# Levels: what is claimed is what was done.

LEVELS = {
    "a tree": (lambda x: x.sum(-1), (8, 300), {"Tree": Level.SOURCE}),
    "a tree in chunks": (lambda x: x.sum(-1), (4, 100000), {"Tree": Level.SOURCE}),
    "a chain": (lambda x: x @ x.t(), (64, 70), {"Chain": Level.SOURCE}),
    "a sum that is written out": (lambda x: x.sum(-1), (8, 5), {"Tree": Level.CONSTRUCTION}),
    "an extremum": (lambda x: x.amax(-1), (8, 300), {"Exact": Level.CONSTRUCTION}),
    "a scan": (lambda x: x.cumsum(-1), (8, 30), {"Scan": Level.CONSTRUCTION}),
}


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
@pytest.mark.parametrize("name", LEVELS)
def test_levels(name, target):
    fn, shape, expected = LEVELS[name]
    made = certificate(fn, torch.randn(*shape), target=target)
    found = {entry.form.split("(")[0]: entry.level for entry in made.entries if entry.form}
    assert {kind: found[kind] for kind in expected} == {kind: level.value for kind, level in expected.items()}
    assert all(entry.level == Level.CONSTRUCTION.value for entry in made.entries if not entry.form)


def test_nothing_is_claimed_beside_what_is_unproven():
    options = {"batchinv.unproven": "warn"}
    with pytest.warns(UserWarning, match="UNPROVEN"):
        made = certificate(lambda x: torch.linalg.svdvals(x) + x.sum(), torch.randn(40, 40), options=options)
    levels = {entry.op: entry.level for entry in made.entries}
    assert levels["aten._linalg_svd.default"] == Level.NONE.value
    assert levels["aten.sum.default"] == Level.CONSTRUCTION.value
    assert {kernel.level for kernel in made.kernels} == {Level.NONE.value}
    assert ("batchinv.unproven", "warn") in made.environment.options
    assert "UNPROVEN" in str(made.same_numerics(made))


# Forms know reduced lengths only.


def example_of(shape_env):
    return entries.Example(lambda n: n, lambda n: sympy.sympify(n).xreplace(shape_env.backed_var_to_val))


def ruled(fn, *args):
    """Node, ruling and example of the first op with a form in the lowered graph of ``fn`` at symbolic sizes."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(fn, tracing_mode="symbolic")(*args)
    for node in graph.graph.nodes:
        if node.op == "call_function" and (form := verdicts.rule(node).form):
            return node, form, example_of(node.meta["val"].fake_mode.shape_env)
    raise AssertionError("no op has a form")


@pytest.mark.parametrize(
    "fn", [lambda x: x.sum(-1), lambda x: x.mean((0, 2)), lambda x: x.flatten(0, 1) @ x[0].t()]
)
def test_a_form_over_reduced_lengths_passes(fn):
    entries.check_form(*ruled(fn, torch.randn(4, 5, 6)))


def test_a_batch_symbol_in_a_form_is_found():
    node, form, example = ruled(lambda x: x.sum(-1), torch.randn(4, 6))
    batch = node.args[0].meta["val"].shape[0].node.expr
    for length in (batch, batch * form.length, form.length + sympy.Symbol("s99")):
        with pytest.raises(BatchInvarianceError, match=r"depends on s\d+, which is no length it reduces"):
            entries.check_form(node, dataclasses.replace(form, length=length), example)


def test_another_length_in_a_form_is_found():
    node, _, example = ruled(lambda x: x.sum(-1), torch.randn(4, 6))
    with pytest.raises(BatchInvarianceError, match="another length than the 6 elements"):
        entries.check_form(node, contract.Tree("float32", "sum", 24), example)


def test_the_check_runs_on_every_compile(monkeypatch):
    """With a ruling that lets the batch into the form, nothing is compiled."""
    monkeypatch.setattr(verdicts, "_reduced_length", lambda x, dims: verdicts._length(x.shape))
    with pytest.raises((BatchInvarianceError, InductorError), match="canonical form"):
        inspect(lambda x: x.sum(-1), torch.randn(4, 600), dynamic=True)


# Same numerics.


def test_training_serves_what_inference_computes():
    model, x = Block(), torch.randn(8, WIDTH)
    trained, served = certify(model, x, backward=True), certify(model, torch.randn(1, WIDTH), dynamic=True)
    assert trained.same_numerics(served) and served.same_numerics(trained)
    assert [made.is_backward for made in trained.certificates] == [False, True]


DIFFERENT = {
    "order of operands": (
        lambda x, y: x.exp() - y,
        lambda x, y: torch.rsub(x.exp(), y),
        "reads exp, input 1 against",
    ),
    "dimension": (lambda x, y: x.sum(0), lambda x, y: x.sum(1), "constants"),
    "transposed": (lambda x, y: x @ y, lambda x, y: x @ y.t(), "permute"),
    "factors": (lambda x, y: x @ x.exp(), lambda x, y: x.exp() @ x, "aten.mm.default reads"),
    "not transposed back": (
        lambda x, y: (x @ x.exp()).sin(),
        lambda x, y: (x.exp().t() @ x.t()).sin(),
        "aten.sin.default reads",
    ),
    "cut between transposes": (
        lambda x, y: (x @ x.exp()).sin(),
        lambda x, y: (x.exp().t() @ x.t()).reshape(16, 64).t().sin(),
        "aten.sin.default reads",
    ),
    "order of a product": (
        lambda x, y: x @ x.exp(),
        lambda x, y: (x.exp().t().flip(1) @ x.t().flip(0)).t(),
        "flip",
    ),
    "slice": (lambda x, y: x[:, 1:9].exp(), lambda x, y: x[:, 2:10].exp(), "start"),
    "constant": (lambda x, y: x * 2.5, lambda x, y: x * 2.25, "other=2.5"),
    "limit": (lambda x, y: x.clamp(min=0.5), lambda x, y: x.clamp(max=0.5), "against"),
    "what is read": (lambda x, y: x.exp() * y.sin(), lambda x, y: x.exp() * x.sin(), "aten.sin"),
    "one more": (lambda x, y: x.exp(), lambda x, y: x.exp().sin(), "b goes on where the other ends"),
    "rounding": (lambda x, y: x.exp().half().float() * 2, lambda x, y: x.exp() * 2, "convert_element_type"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_two_functions_part(name):
    one, other, says = DIFFERENT[name]
    x, y = torch.randn(32, 32), torch.randn(32, 32)
    a, b = (certificate(fn, x, y, target="cpu") for fn in (one, other))
    compared = a.same_numerics(b)
    assert not compared and says in str(compared) and a.fingerprint != b.fingerprint
    assert "test_certificate.py:" in str(compared)
    assert a.same_numerics(a) and str(a.same_numerics(a)) == "same numerics"


SPELLINGS = {
    "mm": (lambda x, y, z: x @ y, lambda x, y, z: (y.t() @ x.t()).t()),
    "addmm": (
        lambda x, y, z: torch.addmm(z, x, y, beta=0.5),
        lambda x, y, z: torch.addmm(z.t(), y.t(), x.t(), beta=0.5).t(),
    ),
    "bmm": (
        lambda x, y, z: torch.bmm(x[None].exp(), y[None]),
        lambda x, y, z: torch.bmm(y[None].transpose(1, 2), x[None].exp().transpose(1, 2)).transpose(1, 2),
    ),
    "symmetric": (lambda x, y, z: x.t() @ x, lambda x, y, z: (x.t() @ x).t()),
}


def test_a_product_and_its_transpose_are_one():
    """Autograd writes either, by strides that follow the batch: one digest, read and used as one.

    That the bits are the same, see ``test_cpp_matmul.py``, and the swapped tiles of ``doctor``.
    """
    x, y, z = (torch.randn(*shape) for shape in ((9, 70), (70, 5), (9, 5)))

    def written(number):
        def several(x, y, z):
            products = [spelling[number](x, y, z) for spelling in SPELLINGS.values()]
            return [value for product in products for value in (product, product.mT.exp())]

        return several

    a, b = (certificate(written(number), x, y, z, target="sm_90") for number in (0, 1))
    assert a.fingerprint == b.fingerprint and a.same_numerics(b)
    assert str(a).count("permute") < str(b).count("permute")


def test_another_architecture_or_version_is_no_promise():
    x = torch.randn(3, WIDTH)
    model = Block()
    ours, ampere, cpu = (certificate(model, x, target=target) for target in ("sm_90", "sm_80", "cpu"))
    assert "sm_90 against sm_80" in ours.same_numerics(ampere).reason and ours.digest != ampere.digest
    assert "cuda" in ours.same_numerics(cpu).reason
    older = dataclasses.replace(ours.environment, versions=(("torch", "1.0"),))
    assert "torch" in ours.same_numerics(dataclasses.replace(ours, environment=older)).reason


def test_a_dynamic_graph_has_the_floats_of_its_example_as_constants():
    class Scaled(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return (x * self.factor).sum(-1)

    x = torch.randn(8, 64)
    static, dynamic = certificate(Scaled(0.3), x), certificate(Scaled(0.3), x, dynamic=True)
    assert static.fingerprint == dynamic.fingerprint and dynamic.floats and not static.floats
    assert "given the float inputs" in str(static.same_numerics(dynamic))
    assert not static.same_numerics(certificate(Scaled(0.4), x, dynamic=True))


# The batch as a symbol.


def linear(x, weight):
    return F.gelu(x @ weight).softmax(-1)


WEIGHT = torch.randn(64, 64)
#: Function, ops through which a row sees another (the rest of them follow), how many ops have ROW-MIXING for a verdict.
MIXING = {
    "batch norm in training": (
        lambda x, weight: F.batch_norm(x, None, None, training=True), ("aten.var_mean.correction",), 1,
    ),
    "softmax over the batch": (lambda x, weight: x.softmax(0), ("aten.amax.default", "aten.sum.dim_IntList"), 2),
    "the mean of a loss": (lambda x, weight: (x - 1).square().mean(), ("aten.mean.default",), 1),
    "a transposed product": (lambda x, weight: x.t() @ x, ("aten.mm.default",), 1),
    "similarities of rows": (lambda x, weight: x @ x.t(), ("aten.mm.default",), 1),
    "rows turned round": (lambda x, weight: linear(x, weight).flip(0), ("prims.rev.default",), 0),
    "none": (linear, (), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_for_each_output_it_is_said_through_which_op_rows_see_another(name):
    fn, ops, marked = MIXING[name]
    made = certify(lambda x, weight: (linear(x, weight), fn(x, weight)), torch.randn(5, 64), WEIGHT)
    ((apart, output),) = made.batch.outputs
    assert made.batch.holds and (apart.dim, apart.mixing) == (0, ())
    assert bool(output.mixing) == bool(ops) == bool(made.batch.row_mixing)
    assert {cause.op for cause in output.mixing} <= set(ops)
    assert all("test_certificate.py:" in cause.source and cause.node for cause in output.mixing)
    assert made.certificates[0].counts.get("ROW-MIXING", 0) == marked
    assert ("ROW-MIXING: a row can see another" in str(made)) == bool(ops)
    jsonschema.validate(json.loads(made.to_json()), SCHEMA)
    assert Certification.from_json(made.to_json()) == made


def test_without_the_analysis_nothing_is_called_apart(monkeypatch):
    """The rules switched off: an op without one counts as mixing, so a clean model is not certified by default."""
    monkeypatch.setattr(bi_inductor.row_mixing.rules, "RULES", {})
    made = certify(linear, torch.randn(5, 64), WEIGHT)
    assert {cause.reason for cause in made.batch.row_mixing} == {"nothing is known about it"}


def test_gradients_of_weights_add_rows_and_those_of_inputs_do_not():
    made = certify(nn.Linear(64, 8), torch.randn(5, 64, requires_grad=True), backward=True)
    (forward, backward) = made.batch.outputs
    assert [output.mixing for output in forward] == [()]
    by_dim = {output.dim: {cause.op for cause in output.mixing} for output in backward}
    assert by_dim[0] == set() and by_dim[None] <= {"aten.mm.default", "aten.sum.dim_IntList"}


@pytest.mark.lengthy
def test_what_a_backward_reads_is_known_from_its_forward(monkeypatch):
    """Statistics of the batch have no rows to be seen by: that rows are mixed in them, only the forward shows."""
    model, x = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8)), torch.randn(5, 64, requires_grad=True)
    assert any(output.dim == 0 for output in certify(model, x, backward=True).batch.outputs[1])
    normed = nn.Sequential(nn.BatchNorm1d(64, affine=False, track_running_stats=False), nn.LayerNorm(64))
    assert all(
        output.mixing for output in certify(normed, x, backward=True).batch.outputs[1] if output.dim is None
    )
    assert not any(output.dim == 0 for output in certify(normed, x, backward=True).batch.outputs[1])
    monkeypatch.setattr(bi_inductor.row_mixing.analysis._Saved, "is_like", lambda *_: False)
    lost = certify(model, x, backward=True).batch.outputs[1]
    assert {cause.reason for output in lost for cause in output.mixing} >= {
        "a saved tensor that was not found in the forward"
    }


def test_rows_are_mixed_in_one_way_whatever_the_batch():
    one, five = (certify(lambda x: x - x.mean(0), torch.randn(batch, 64)) for batch in (1, 5))
    assert one.batch.outputs == five.batch.outputs


def test_a_batch_that_decides_the_graph_is_not_shown_to_be_free():
    fixed = certify(lambda x: x * 2 if x.shape[0] == 5 else x.softmax(-1), torch.randn(5, 64))
    assert not fixed.batch.holds and "constant" in fixed.batch.reason and "NOT SHOWN" in str(fixed)
    narrowed = certify(lambda x: x.sum(-1) * (3 if x.shape[0] > 6 else 4), torch.randn(5, 64))
    assert narrowed.batch.holds and any("<= 6" in guard for guard in narrowed.batch.guards)
    with pytest.raises(ValueError, match="no tensor argument has a dimension 3"):
        certify(torch.sin, torch.randn(5, 64), batch_dim=3)


# A whole model: a Llama of two layers with random weights.


@pytest.mark.lengthy
def test_a_llama_has_one_digest_at_every_batch_static_and_dynamic():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = {batch: torch.zeros(batch, 8, dtype=torch.long) for batch in (1, 2, 64, 4096)}
    made = certify(model, tokens[2])  # compiles it at batch 2, and with the batch as a symbol
    assert made.batch.holds and not made.batch.row_mixing
    jsonschema.validate(json.loads(made.to_json()), SCHEMA)
    (first,) = made.certificates
    assert set(first.counts) == {"CANONICAL", "INVARIANT"}
    assert first.levels["verified in source"] >= 12
    others = [certificate(model, tokens[batch]) for batch in (1, 4096)]
    others.append(certificate(model, tokens[64], dynamic=True))
    assert {other.digest for other in others} == {first.digest}
    for other in others:
        assert first.same_numerics(other)


# Where certificates are found.


def test_logs_and_the_structured_artifact(caplog, monkeypatch):
    artifacts = []

    def record(kind, metadata_fn=dict, payload_fn=lambda: None, **_):
        if kind == "artifact" and metadata_fn().get("name") == "batchinv_certificate":
            artifacts.append((metadata_fn(), json.loads(payload_fn())))

    monkeypatch.setattr(bi_inductor.attest, "trace_structured", record)
    caplog.set_level(logging.DEBUG, logger="bi_inductor")
    compiled = torch.compile(lambda x: F.softmax(x, -1), backend="batchinv")
    compiled(torch.randn(3, 50))
    ((metadata, payload),) = artifacts
    assert metadata == {"name": "batchinv_certificate", "encoding": "json"}
    lines = payload.pop("annotated_graph")
    jsonschema.validate(payload, {**SCHEMA, "$ref": "#/$defs/certificate", "properties": {}, "required": [],
                                  "additionalProperties": True})  # fmt: skip
    assert any("# CANONICAL Tree(float32, sum, 50) (verified in source)" in line for line in lines)
    assert "batchinv certificate, cpu, forward" in caplog.text and lines[1] in caplog.text


def test_a_graph_from_a_cache_is_logged_and_traced_too(caplog, monkeypatch, tmp_path):
    payloads = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        bi_inductor.attest, "trace_structured", lambda *_, payload_fn, **__: payloads.append(payload_fn())
    )
    caplog.set_level(logging.DEBUG, logger="bi_inductor")
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(lambda x: F.softmax(x, -1) * 3, backend="batchinv")(torch.randn(3, 50))
    made, loaded = map(json.loads, payloads)
    assert made.pop("annotated_graph") and loaded.pop("annotated_graph") == [] and made == loaded
    assert caplog.text.count("batchinv certificate, cpu, forward") == 2
    assert caplog.text.count("loaded from a cache") == 1
