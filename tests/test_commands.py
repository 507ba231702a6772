"""The command line: certify and check; answers, exit codes, JSON, and one line for what cannot be done."""

import json

import jsonschema
import pytest
from test_certificate import SCHEMA

from bi_inductor.cli import main
from bi_inductor.commands.side_by_side import side_by_side
from bi_inductor.inspection import Inspection

STEPS = """
import torch
torch.manual_seed(0)
weight = torch.randn(512, 512)

def step(x):
    return torch.softmax(torch.nn.functional.layer_norm(x, (512,)) @ weight, -1)

def other(x):
    return torch.softmax(torch.nn.functional.layer_norm(x, (512,)) @ weight + 1, -1)

def fixed(x):
    return x * 2 if x.shape[0] == 3 else x.softmax(-1)

def unproven(x):
    return torch.linalg.vector_norm(torch.linalg.svdvals(x.unsqueeze(-1)), dim=-1)

def misfit(x):
    return x + torch.ones(3)

def refused(x):
    return torch.linalg.svdvals(x.unsqueeze(-1))

def example_inputs(batch):
    return (torch.randn(batch, 512),)
"""


@pytest.fixture
def steps(tmp_path):
    path = tmp_path / "steps.py"
    path.write_text(STEPS)
    return str(path)


def run(capsys, *arguments):
    """(exit code, stdout, stderr without progress)."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if not line.endswith(" ...")]


def test_certify_and_compare_with_what_was_written(steps, capsys, tmp_path):
    written = str(tmp_path / "made.json")
    code, out, _ = run(capsys, "certify", f"{steps}:step", "--batch", "1,5", "--output", written)
    assert code == 0 and "one digest, whatever the batch" in out and "verified in source" in out
    assert "rows apart along dimension 0" in out and "ROW-MIXING" not in out
    jsonschema.validate(json.loads((tmp_path / "made.json").read_text()), SCHEMA)
    code, out, _ = run(
        capsys, "certify", f"{steps}:step", "--batch", "7", "--backward", "--against", written, "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["same_digest"] and not report["differences"]
    jsonschema.validate(report["certification"], SCHEMA)
    code, out, _ = run(capsys, "certify", f"{steps}:other", "--batch", "5", "--against", written)
    assert code == 1 and "numerics differ" in out and "aten.add.Tensor" in out and "steps.py:" in out


def test_certify_says_where_the_batch_is_not_free(steps, capsys):
    code, out, _ = run(capsys, "certify", f"{steps}:fixed", "--batch", "2,3", "--target", "cpu")
    assert code == 1 and "numerics differ" in out and "became a constant" in out


def test_a_refusal_is_an_object_too(steps, capsys):
    code, out, errors = run(
        capsys, "certify", f"{steps}:refused", "--batch", "2", "--target", "cpu", "--json"
    )
    assert code == 1 and errors[0].startswith("batchinv refuses aten._linalg_svd")
    refused = json.loads(out)["refused"]
    assert refused["op"] == "aten._linalg_svd.default" and "steps.py:" in refused["source"]
    assert refused["reason"] and refused["remedy"]
    code, out, _ = run(capsys, "inspect", f"{steps}:refused", "--batch", "2", "--target", "cpu")
    assert code == 1 and out == ""


@pytest.mark.lengthy
def test_check_counts_rows_and_names_the_op(steps, capsys):
    code, out, _ = run(capsys, "check", f"{steps}:step", "--batch", "1,9", "--json")
    report = json.loads(out)
    ours, stock = report["backends"]
    assert code == 0 and not report["batchinv_changed"]
    assert ours == {"backend": "batchinv", "changed": {"1": 0, "9": 0}, "first": ""}
    assert (
        stock["changed"]["9"] > 0
        and "first op whose bits differ" in stock["first"]
        and "steps.py:" in stock["first"]
    )


def test_check_of_an_unproven_op(steps, capsys):
    arguments = ["check", f"{steps}:unproven", "--batch", "1,4", "--backend", "batchinv"]
    assert run(capsys, *arguments)[0] == 1  # refused
    with pytest.warns(UserWarning, match="UNPROVEN"):
        code, out, _ = run(capsys, *arguments, "--unproven")
    assert out.startswith("rows that changed") and code == (1 if "first op" in out else 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["certify", "STEPS:nothing"], "defines no function"),
        (["inspect", "STEPS:misfit"], "misfit fails at batch 1: RuntimeError('"),
        (["certify", "STEPS:step", "--target", "sm_91"], "did you mean"),
        (["certify", "STEPS:step", "--against", "missing.json"], "cannot read missing.json"),
        (["certify", "STEPS:step", "--against", "STEPS"], "cannot read"),
        (["certify", "STEPS:step", "--output", "no/such/place.json"], "there is no directory"),
        (["certify", "STEPS:step", "--batch", "one"], "positive integers"),
        (["check", "STEPS:step", "--backend", "tvm"], "unknown backend 'tvm'"),
        (["check", "missing.py:step"], "there is no file"),
        (["inspect", "STEPS:step", "--target", "cpu", "--resources"], "give a GPU as --target"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(steps, arguments, says, capsys):
    code, out, errors = run(capsys, *(argument.replace("STEPS", steps) for argument in arguments))
    assert code == 2 and not out and len(errors) == 1 and says in errors[0]


def test_inspect_shows_code_that_differs_side_by_side(steps, capsys):
    code, out, _ = run(capsys, "inspect", f"{steps}:step", "--batch", "1,64")
    assert code == 0 and "batch 1 and batch 64: the code differs in" in out
    assert any(" | " in line and "M = 1" in line and "M = 64" in line for line in out.splitlines())


def test_same_code_is_said_to_be(steps, capsys):
    empty = Inspection("sm_90", ())
    assert side_by_side(empty, empty, ("a", "b")) == "a and b: the same code"


def test_inspect_counts_resources(steps, capsys):
    code, out, _ = run(capsys, "inspect", f"{steps}:step", "--batch", "4", "--resources", "--json")
    (kernels,) = json.loads(out)["resources"].values()
    assert code == 0 and len(kernels) == 3
    assert all(0 < kernel["registers"] <= 255 and not kernel["spills"] for kernel in kernels)
    assert all(kernel["shared_bytes"] >= 0 and kernel["target"] == "sm_90" for kernel in kernels)
