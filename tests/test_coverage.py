"""The table of operators: each verdict is found by a case that has it, and a violation is called one."""

import dataclasses
import json
import types

import pytest
import torch
from devices import DEVICES

from bi_inductor import coverage, coverage_pool, scope
from bi_inductor.cli import main
from bi_inductor.coverage import OpResult, Settings, judge, judge_op
from bi_inductor.coverage_cases import ROWS, Case, cases_of, entries
from bi_inductor.coverage_stock import fallbacks

#: One of each kind of form, and of each way to have rows; all of the database is the command's.
SAMPLE = {
    "nn.functional.avg_pool2d": "canonical",
    "logcumsumexp": "canonical",
    "index_reduce.mean": "canonical",
    "nn.functional.layer_norm": "canonical",
    "sin": "invariant",
    "uniform": "canonical",
    "empty_like": "invariant",
    "cross": "invariant",
    "linalg.eigh": "refused",
    "masked_select": "refused",
}


@pytest.mark.lengthy
@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("device", DEVICES)
def test_ops_of_the_database_keep_their_verdict_and_their_bits(device, name):
    result = judge_op(name, Settings(target=device, samples=1))
    assert result.verdict == SAMPLE[name], result.reason
    assert all(case.near_eager for case in result.cases)
    assert (result.rows > 0) == (result.verdict != "refused")


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "name", ["index_reduce.mean", "nn.functional.layer_norm", "broadcast_tensors", "sin"]
)
def test_a_gpus_kernels_are_judged_in_the_interpreter(name):
    """With gradients; those of ``broadcast_tensors`` are sums that its views leave to autograd."""
    result = judge_op(name, Settings("interpreter", samples=1, backward=True))
    assert result.verdict == ("invariant" if name == "sin" else "canonical"), result.reason
    assert result.rows > ROWS and all(case.near_eager for case in result.cases)


#: Whose kernels are only looked at: for the CPU and for a GPU that is not there, forward and backward.
LOWERED = """cummax histc mode median multinomial stft fft.irfft linalg.solve complex
    nn.functional.adaptive_max_pool2d masked_scatter nn.functional.interpolate.linear""".split()


@pytest.mark.lengthy
@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_ops_of_the_database_are_lowered(target):
    settings = Settings(target=target, samples=1, lower_only=True, backward=True)
    results = [judge_op(name, settings) for name in LOWERED]
    # Its sample wants a sparse gradient, which has no form.
    results.append(judge_op("nn.functional.embedding_bag", dataclasses.replace(settings, backward=False)))
    assert {r.op: r.reason for r in results if r.verdict not in ("canonical", "invariant")} == {}


def test_sizes_read_from_a_tensor_are_invariant():
    """Without data the graph cannot be followed: lowering alone is not enough, so it is compiled and run."""
    x, ends = torch.randn(7, 3), torch.tensor([2, 5])
    case = Case(0, "as it is", lambda x, ends: torch.tensor_split(x, ends), (x, ends), frozenset())
    found = judge(case, Settings(lower_only=True))
    assert found.verdict == "invariant" and found.rows and found.near_eager, found


def test_reasons_are_readable_and_the_same_every_time():
    sparse = judge_op("to_sparse", Settings(samples=1, lower_only=True))
    assert sparse.verdict == "uncaptured" and "sparse" in sparse.reason
    assert coverage._described(ValueError(f"of {object()}")) == "ValueError: of <object object>"


def test_what_stock_lowers_itself_is_told_from_what_it_hands_to_aten():
    assert fallbacks(next(cases_of(entries()["softmax"], 1))) == ()
    refused = judge_op("linalg.eigh", Settings(samples=1, lower_only=True))
    assert {case.stock for case in refused.cases} == {"aten._linalg_eigh.default"}
    assert not refused.is_lowered_by_stock
    owed = dataclasses.replace(refused.cases[0], stock="none")
    assert OpResult("x", "cpu", (owed,)).is_lowered_by_stock


def test_cases_have_rows_of_their_own():
    rows = next(case for case in cases_of(entries()["softmax"], 3) if case.lift == "rows")
    values = rows.call(*rows.arguments(0, ROWS))
    assert len(values) == ROWS and not any(torch.equal(values[0], row) for row in values[1:])


def test_a_changed_bit_is_a_violation():
    """Teeth: a function whose rows see the batch size in their last bits."""

    def leaning(x):
        return x + x.shape[0] * 2.0**-20

    x = torch.ones(ROWS, 3)
    result = judge(Case(0, "rows", leaning, (x,), frozenset([0])), Settings())
    assert result.verdict == "VIOLATION" and 0 < result.changed <= result.rows


@pytest.mark.lengthy
def test_stock_inductor_is_found_out():
    """Negative control: the same samples, through the same comparison."""
    stock = Settings(backend="inductor", samples=4, dynamic=True)
    result, others = judge_op("nn.functional.linear", stock), judge_op("linalg.vector_norm", stock)
    assert "VIOLATION" in (result.verdict, others.verdict), (result, others)


def test_what_eager_cannot_do_here_is_no_error():
    result = judge_op("jiterator_unary", Settings(samples=1))
    assert result.verdict == "uncaptured" and result.reason.startswith("eager fails too: ")


@pytest.mark.lengthy
def test_a_crash_is_an_error_and_the_table_goes_on(monkeypatch):
    results = list(coverage_pool.judged(["no such op", "sin"], Settings(samples=1, lower_only=True), 300))
    assert [r.verdict for r in results] == ["ERROR", "invariant"] and "KeyError" in results[0].reason


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_whose_gpu_has_failed_is_replaced(fails, monkeypatch):
    """An assertion in a kernel ends all that its process can do on a GPU, for every op that follows."""

    def synchronize():
        if fails:
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    worker, settings = coverage_pool._Worker(Settings()), Settings("cuda")
    answer, stopped = OpResult("sin", "cuda", ()), []
    worker.process = object()
    worker.connection = types.SimpleNamespace(
        send=lambda name: None,
        poll=lambda limit: True,
        recv=lambda: (answer, coverage_pool._goes_on(settings)),
    )
    monkeypatch.setattr(worker, "stop", lambda: stopped.append(True))
    assert worker.judge("sin", 1) is answer and stopped == [True] * fails


@pytest.mark.lengthy
def test_the_command_resumes_and_writes(tmp_path, capsys):
    written, table = tmp_path / "results.jsonl", tmp_path / "table.md"
    known = OpResult("cos", "cpu", ())
    written.write_text(json.dumps({"op": "cos", "target": "cpu", "cases": [], "seconds": 0.0}) + "\n")
    command = ["coverage", "--ops", "cos,eye", "--samples", "1", "--lower-only", "--resume", str(written)]
    assert main([*command, "--markdown", str(table), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [op["op"] for op in report["ops"]] == ["cos", "eye"] and len(written.read_text().splitlines()) == 2
    assert "| eye | invariant |" in table.read_text() and f"| cos | {known.verdict} |" in table.read_text()


@pytest.mark.parametrize(
    "wrong", [["--ops", "no_such_op"], ["--shard", "3/2"], ["--backend", "eager"], ["--target", "sm_1"]]
)
def test_wrong_arguments_get_one_line(wrong, capsys):
    assert main(["coverage", *wrong]) == 2
    assert capsys.readouterr().err.startswith("batchinv: ")


def test_judging_leaves_stock_as_it_was():
    judge_op("linalg.eigh", Settings(samples=1))
    assert scope._depth == 0 and not scope._originals
