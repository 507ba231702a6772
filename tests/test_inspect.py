"""What inspect shows: one fingerprint per function, whatever the batch, and no sum that is not ours."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from inspected import HIDDEN, REDUCTIONS, WIDTH, Block
from torch import nn
from torch._inductor.compile_fx import compile_fx

from bi_inductor import BatchInvarianceError, OptionError, certificates, commands, inspect
from bi_inductor.cli import main
from bi_inductor.dry_run import DryRun
from bi_inductor.passes import canonicalize
from bi_inductor.passes.copies import COPIES

BATCHES = [1, 3, 64, 4096]
FORBIDDEN = re.compile(
    r"\bextern_kernels\.|\btl\.sum\(|\btl\.atomic_|\btriton_helpers\.welford|\batomic_add\("
)


def fingerprint(fn, *args, **options):
    return inspect(fn, *args, **options).fingerprint


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "cpu"])
def test_a_model_has_one_fingerprint_and_only_our_sums(target):
    model = Block()
    inspections = [inspect(model, torch.randn(batch, WIDTH), target=target) for batch in BATCHES]
    assert len({inspection.fingerprint for inspection in inspections}) == 1
    for inspection in inspections:
        assert not FORBIDDEN.findall(inspection.source)
        assert len(inspection.graphs) == 1 and inspection.kernels
        assert {entry.verdict for entry in inspection.verdicts} == {"INVARIANT", "CANONICAL"}


def test_stock_inductor_does_not_pass_for_ours(monkeypatch):
    """The same look at stock's code finds library kernels and sums in the order of the layout."""

    def stock(gm, inputs, *, options=None):
        return compile_fx(gm, inputs)

    monkeypatch.setattr("bi_inductor.backend.batchinv", stock)
    (source,), _ = DryRun("sm_90")(Block(), (torch.randn(64, WIDTH),), {})
    assert {"extern_kernels.", "tl.sum("} <= set(FORBIDDEN.findall(source))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_too(dtype):
    model = Block().to(dtype)
    inspections = [inspect(model, torch.randn(batch, WIDTH, dtype=dtype)) for batch in BATCHES]
    assert len({inspection.fingerprint for inspection in inspections}) == 1
    assert not any(FORBIDDEN.findall(inspection.source) for inspection in inspections)


@pytest.mark.parametrize("name", [n for n in REDUCTIONS if n not in ("sum outer", "sum two dims", "sum all")])
def test_row_functions_have_one_fingerprint(name):
    fn = REDUCTIONS[name]
    assert len({fingerprint(fn, torch.randn(batch, 512)) for batch in (1, 64)}) == 1


def test_static_dynamic_and_training_agree():
    model, x = Block(), torch.randn(8, WIDTH)
    static = inspect(model, x)
    training = inspect(model, x, backward=True)
    assert fingerprint(model, x, dynamic=True) == static.fingerprint
    assert [graph.is_backward for graph in training.graphs] == [False, True]
    assert training.certificates[0].fingerprint == static.certificates[0].fingerprint
    assert not FORBIDDEN.findall(training.source)


def test_what_a_forward_saves_is_not_in_the_fingerprint():
    """At batch 1 the transposed weight is saved, at others it is transposed again in the backward."""
    weight = torch.randn(1, 5)

    def product(x):
        return weight.to(x.device) @ F.pad(x, (1, 2)), x.exp()

    made = [
        inspect(product, torch.randn(batch, 5, 33).requires_grad_(), backward=True) for batch in (1, 2, 131)
    ]
    saved = {one.certificates[1].inputs for one in made}
    assert len(saved) > 1 and len({one.fingerprint for one in made}) == 1

    def other(x):
        return weight.to(x.device) @ F.pad(x, (1, 2)), x.cos()

    x = torch.randn(2, 5, 33).requires_grad_()
    assert inspect(other, x, backward=True).fingerprint != made[1].fingerprint


def test_a_gradient_that_is_written_as_a_transposed_product_is_the_same():
    """At batch 1 a column is a row, too, and autograd multiplies the weight by the transposed gradient."""
    weight = torch.randn(1, 16)

    def product(x):
        return x.exp() @ weight.to(x.device)

    made = [inspect(product, torch.randn(batch, 1).requires_grad_(), backward=True) for batch in (1, 131)]
    products = {
        entry.inputs for one in made for entry in one.certificates[1].entries if entry.op == "aten.mm.default"
    }
    assert len(products) == 2 and made[0].fingerprint == made[1].fingerprint


COLUMNS = {
    "used": lambda x, y: (y.sin() + x * 3, y * y),
    "returned": lambda x, y: (y, x * 3, x.sin()),
    "in place": lambda x, y: (y.sin() + x * 3, (y * y).add_(1)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_gradients_of_a_copy_are_added_first_at_every_batch_size(name, monkeypatch):
    """A column of one row is contiguous: without the pass autograd adds four gradients, not two and two."""

    def column(x):
        last = x[:, -1:]
        return COLUMNS[name](last, last.contiguous())

    def prints():
        inputs = [torch.randn(batch, 5).requires_grad_() for batch in (1, 131)]
        return {inspect(column, x, backward=True).fingerprint for x in inputs}

    assert len(prints()) == 1
    monkeypatch.setattr(canonicalize, "REWRITES", canonicalize.REWRITES[: -len(COPIES)])
    assert len(prints()) == 2


def test_a_copy_that_changes_nothing_is_dropped():
    for dynamic in (False, True):
        made = inspect(lambda x: x.contiguous().exp().contiguous() + x, torch.randn(8, 512), dynamic=dynamic)
        assert len(made.kernels) == 1 and "clone" not in made.source.split("def call")[1]


def test_a_slice_that_is_everything_is_not_in_the_fingerprint():
    """Its gradient is written into zeros at most batch sizes, and dropped by Inductor at batch 1, since torch 2.13."""

    def narrowed(x):
        y = x.transpose(0, -1)
        return y.exp(), (y * y).narrow(1, 0, 1)

    made = [inspect(narrowed, torch.randn(batch, 1, 7).requires_grad_(), backward=True) for batch in (1, 131)]
    ways = {"slice_scatter" in str(one.certificates[1]) for one in made}
    assert len(ways) == 2 or torch.__version__ < "2.13"
    assert made[0].fingerprint == made[1].fingerprint


CHANGES = {
    "eps": lambda m, x: (Block(eps=1e-5), x),
    "reduction length": lambda m, x: (Block(width=2 * WIDTH), torch.cat([x, x], 1)),
    "hidden size": lambda m, x: (Block(hidden=2 * HIDDEN), x),
    "dtype": lambda m, x: (copy.deepcopy(m).bfloat16(), x.bfloat16()),
    "op": lambda m, x: (nn.Sequential(m, nn.ReLU()), x),
    "order of ops": lambda m, x: (lambda y: m(2 * y) + 1, x),
    "dim": lambda m, x: (lambda y: m(y).softmax(0), x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_numerics_changes_the_fingerprint(change):
    model, x = Block(), torch.randn(8, WIDTH)
    assert fingerprint(*CHANGES[change](model, x)) != fingerprint(model, x)


def test_order_of_two_ops_changes_the_fingerprint():
    x = torch.randn(4, 32)
    assert fingerprint(lambda x: (x.exp() + 1).log(), x) != fingerprint(lambda x: (x + 1).log().exp(), x)


def test_weights_and_names_do_not_change_the_fingerprint():
    x = torch.randn(8, WIDTH)
    model = Block()
    assert fingerprint(Block(), x) == fingerprint(model, 5 * x) == fingerprint(lambda y: model(y), x)


def test_history_does_not_change_the_source():
    def kernels(batch):
        return inspect(Block(), torch.randn(batch, WIDTH)).kernels

    first = kernels(3)
    kernels(64), kernels(7)
    assert kernels(3) == first


def test_str_and_json():
    inspection = inspect(Block(), torch.randn(3, WIDTH))
    text = str(inspection)
    for part in (
        "batchinv for sm_90",
        inspection.fingerprint,
        "CANONICAL",
        "Tree(float32, sum, 64)",
        "@triton.jit",
    ):
        assert part in text
    report = json.loads(json.dumps(inspection.to_json()))
    assert report["fingerprint"] == inspection.fingerprint
    assert list(report["kernels"]) == list(inspection.kernels)
    for name, source in inspection.kernels.items():
        assert f"def {name}(" in source


def test_cpu_target_shows_cpp():
    inspection = inspect(Block(), torch.randn(3, WIDTH), target="cpu")
    assert inspection.kernels
    assert all('extern "C"' in source for source in inspection.kernels.values())
    assert "triton" not in "".join(inspection.kernels.values())


@pytest.mark.lengthy
def test_what_is_inspected_stays_as_it_was():
    model, x = Block(), torch.randn(3, WIDTH, requires_grad=True)
    state = copy.deepcopy(model.state_dict())
    inspect(model, x, backward=True)
    inspect(model, x)
    assert x.device.type == "cpu" and x.grad is None
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, state[name])
    assert not torch._subclasses.fake_tensor.is_fake(model(x))


def test_closures_globals_keywords_methods_and_shared_weights():
    model, weight = Block(), torch.randn(WIDTH, WIDTH)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.b.weight = self.a.weight

        def scores(self, x, *, scale):
            return self.b(self.a(x)) * scale

    x = torch.randn(3, WIDTH)
    assert "torch.Size" not in inspect(lambda x: model(x @ weight)[:, None, ::2] + _OFFSET, x).fingerprint
    tied = inspect(Tied().scores, x, scale=torch.tensor(2.0))
    (unpacked,) = re.findall(r"^ *(.*) = args$", tied.source, re.MULTILINE)
    assert unpacked.count("arg") == 5  # x, scale, two biases and one weight
    pair = inspect(lambda batch: batch["a"] + batch["b"][0], {"a": x, "b": (x,)})
    assert len(pair.graphs) == 1


_OFFSET = torch.ones(1)


def _shifted(x):
    return _scaled(x) + _OFFSET


def _scaled(x, depth=1):
    return _scaled(x * _OFFSET, depth - 1) if depth else x


def test_functions_that_use_globals_and_call_each_other():
    assert inspect(lambda x: _shifted(x).sum(-1), torch.randn(3, WIDTH)).kernels
    assert inspect(_shifted, torch.randn(3, WIDTH)).kernels


def test_graph_breaks_give_several_graphs():
    def fn(x):
        y = x.sum(-1)
        torch._dynamo.graph_break()
        return x * y[:, None]

    inspection = inspect(fn, torch.randn(3, WIDTH))
    assert len(inspection.graphs) == 2 and len(inspection.certificates) == 2


def test_refusals_and_unknown_targets():
    with pytest.raises(BatchInvarianceError, match="svd"):
        inspect(torch.linalg.svdvals, torch.randn(4, 4))
    with pytest.raises(OptionError, match="did you mean 'sm_90'"):
        inspect(torch.sin, torch.randn(4), target="sm_91")


def test_unproven_ops_are_shown_as_such():
    options = {"batchinv.unproven": "warn"}
    inspection = inspect(lambda x: torch.linalg.svdvals(x) + 1, torch.randn(4, 4), options=options)
    assert "UNPROVEN" in {entry.verdict for entry in inspection.verdicts}


def test_nothing_is_registered_as_compiled():
    before = len(certificates())
    inspect(Block(), torch.randn(3, WIDTH))
    assert len(certificates()) == before


# Command line

SCRIPT = """
import torch
weight = torch.randn(64, 32)

def step(x):
    return torch.softmax(x @ weight, -1)

def step_inputs(batch):
    return torch.randn(batch, 64)

def over_the_batch(x):
    return x.sum(0)

def wrong(x):
    return x @ weight.t()

def refused(x):
    return torch.linalg.svdvals(x)

def example_inputs(batch):
    return (torch.randn(batch, 64),)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_cli_inspect(script, capsys):
    assert main(["inspect", f"{script}:step", "--batch", "1,64", "--target", "sm_80"]) == 0
    out = capsys.readouterr().out
    assert out.count("fingerprint") >= 3 and "equal at every batch size" in out and "@triton.jit" in out


def test_cli_json(script, capsys):
    assert main(["inspect", f"{script}:step", "--batch", "1,3", "--target", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same_fingerprint"] and list(report["fingerprints"]) == ["1", "3"]


def test_cli_says_when_the_batch_matters(script, capsys):
    assert main(["inspect", f"{script}:over_the_batch", "--batch", "4,8"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_cli_refusal(script, capsys):
    assert main(["inspect", f"{script}:refused", "--batch", "4"]) == 1
    assert "batchinv refuses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["SCRIPT:nothing"], "defines no function 'nothing'"),
        (["SCRIPT"], "FILE.py:FUNCTION"),
        (["missing.py:step"], "there is no file missing.py"),
        (["SCRIPT:step", "--target", "sm_91"], "did you mean 'sm_90'"),
        (["SCRIPT:step", "--batch", "0"], "positive integers"),
        (["SCRIPT:wrong"], "fails at batch 1"),
    ],
)
def test_cli_mistakes_get_one_line_and_exit_code_2(script, arguments, says, capsys):
    assert main(["inspect", *(a.replace("SCRIPT", script) for a in arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "inspecting at" not in line]
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("command", commands.NAMES)
def test_cli_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and "example" in capsys.readouterr().out


def test_cli_versions(capsys):
    assert main(["versions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == str(torch.__version__)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, bi_inductor
assert bi_inductor.inspect(torch.sin, torch.ones(3), target="cpu").kernels
try:
    bi_inductor.inspect(torch.sin, torch.ones(3), target="sm_90")
except bi_inductor.MissingDependencyError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("no error")
"""


@pytest.mark.lengthy
def test_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
