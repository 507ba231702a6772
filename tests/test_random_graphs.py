"""Random graphs: no row of any of them depends on the batch, here, on a GPU, and in what is generated for one.

A few, the same in every run; ``python -m fuzzing`` (see ``fuzzing/__init__.py``) draws as many as there is time for.
"""

from argparse import Namespace

import pytest
import torch
from fuzzing.campaign import Outcome, compare_generated, drawn, in_bundles
from fuzzing.comparison import FEW, Case, compare
from fuzzing.program import BATCH, Program, Step, Value
from fuzzing.records import Counts, summed
from fuzzing.schedule import Draw, Schedule
from fuzzing.shrinking import shrunk
from fuzzing.strategies import programs
from hypothesis import given, settings
from torch._inductor.codegen.triton import TritonKernelOverrides

from bi_inductor.codegen.triton_ops import TritonOps
from bi_inductor.interpreter import interpreting

GRAPHS = {"cpu": 2, "cuda": 24}
#: Graphs in one compile. What scatters is compiled again at each power of two, with all of its bundle; on a GPU, where
#: several tests run at once, graphs are by themselves.
BUNDLE = {"cpu": 2, "cuda": 1}
#: Whose code is generated and not compiled.
GENERATED = 40


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("device", "first"),
    [
        ("cpu", 0),
        *[pytest.param("cuda", i, marks=pytest.mark.gpu) for i in range(0, GRAPHS["cuda"], BUNDLE["cuda"])],
    ],
)
def test_rows_do_not_depend_on_the_batch(device, first):
    graphs = list(drawn(GRAPHS[device], start=3))[first : first + BUNDLE[device]]
    tally = compare(Case(graphs, device=device), histories=["static inference"])
    assert tally.rows > 1000 * len(graphs) and not tally.violations, tally.violations


@pytest.mark.lengthy
@pytest.mark.parametrize("target", ["sm_90"])
def test_generated_code_does_not_depend_on_the_batch(target):
    """Gradients for a few, results of many: a graph takes 0.2 s for each batch size, and four times that with both."""
    tallies = [compare_generated(list(drawn(4, start=5)), target, batches=(8, 1))]
    for group in in_bundles(drawn(GENERATED, start=6), 20):
        tallies.append(compare_generated(group, target, batches=(8, 1), backward=False))
    assert not [tally.violations for tally in tallies if tally.violations]
    assert len(tallies) > GENERATED / 20


@pytest.mark.lengthy
def test_kernels_in_the_interpreter_do_not_depend_on_the_batch():
    """What a GPU would run, gradients too."""
    tally = compare(Case(list(drawn(3, start=7000))), interpreting(), ["dynamic"], pieces=(3,), whole=FEW)
    assert tally.rows > 100 and not tally.violations, tally.violations


def test_the_interpreter_finds_a_mask_that_was_lost(monkeypatch):
    """Teeth; torch 2.14 loses none by itself."""
    x, v = Value("x0", (BATCH, 8), torch.float32), Value("v0", (BATCH, 8), torch.float32)
    steps = (
        Step(v, "x0.cumsum(1)", ("x0",)),
        Step(Value("v1", (BATCH,), torch.float32), "v0.var(1)", ("v0",)),
    )
    case = Case([Program((x,), (), steps, ("v1",))])
    monkeypatch.setattr(TritonOps, "masked", staticmethod(TritonKernelOverrides.masked))
    tally = compare(case, interpreting(), ["unfused"], pieces=(3,), whole=FEW)
    assert bool(tally.violations) == (torch.__version__ < "2.14")


@settings(max_examples=25)
@given(programs())
def test_no_drawn_graph_mixes_rows(program):
    """Eagerly: rows beside NaN are as near to themselves as anybody can tell.

    Without oneDNN, whose bfloat16 products of an odd K read the next row, times zero, where the CPU has AMX.
    """
    case, rows = Case([program]), torch.arange(0, 67, 2)
    with torch.backends.mkldnn.flags(enabled=False):
        expected, actual = (
            c.run(c.function, torch.arange(67)).at(rows) for c in (case, case.replaced(torch.nan))
        )
    for key, value in expected.rows.items():
        torch.testing.assert_close(actual.rows[key], value, equal_nan=True, rtol=0.1, atol=0.1)


def _normed_product() -> Program:
    x, w = Value("x0", (BATCH, 130), torch.float32), Value("w0", (130, 16), torch.float32)
    steps, shape = [], x.shape
    for number, (expression, reads) in enumerate(
        [
            ("torch.tanh(x0)", ("x0",)),
            ("F.layer_norm(v0, (130,))", ("v0",)),
            ("v1 * 0.5", ("v1",)),
            ("v2 @ w0", ("v2", "w0")),
        ]
    ):
        shape = (BATCH, 16) if number == 3 else x.shape
        steps.append(Step(Value(f"v{number}", shape, torch.float32), expression, reads))
    return Program((x,), (w,), tuple(steps), ("v3", "v1"))


@pytest.mark.lengthy
def test_stock_is_caught():
    """The same comparisons find what stock Inductor changes."""
    tally = compare(Case([_normed_product()]), backend="inductor")
    assert tally.changed > 0 and tally.rows > tally.changed


def test_a_violation_shrinks_to_a_snippet():
    smallest = shrunk(_normed_product(), lambda p: any("layer_norm" in step.expression for step in p.steps))
    assert [step.expression for step in smallest.steps] == ["F.layer_norm(x0, (130,))"]
    snippet = smallest.snippet(batch=9, seed=0, failing="batch 1")
    namespace = {}
    exec(snippet.replace('backend="batchinv"', 'backend="eager"'), namespace)
    assert namespace["x0"].shape == (9, 130)


def _run(schedule, graphs, rounds):
    """Two tasks at a time, the later one finished first: the bundles among them."""
    ran = []
    for _ in range(rounds):
        for task in reversed([task for task in (schedule.next(), schedule.next()) if task]):
            if isinstance(task, Draw):
                schedule.finish(task, graphs.get(task.seed, []))
            else:
                ran.append(task.graphs)
                schedule.finish(task, Outcome(Counts(graphs=len(task.graphs) - 1, failed=1)))
    return ran


def test_a_campaign_goes_on_where_it_ended(tmp_path):
    """No graph is left out or run twice, nor is one that a lower seed has."""
    several = list(drawn(12, start=4))
    graphs = {0: several[:7], 1: several[:2] + several[7:]}
    options = {"csv": tmp_path / "campaign.csv", "target": "sm_90", "seed": 0, "minutes": None, "shrink": 0}
    options |= {"graphs": 1000, "bundle": 2}
    ran = _run(Schedule(Namespace(**options)), graphs, rounds=3)
    ran += _run(Schedule(Namespace(**options)), graphs, rounds=20)
    together = [graph for bundle in ran for graph in bundle]
    assert len(together) == 12 and set(together) == set(several)
    (counts,) = summed(options["csv"]).values()
    assert counts["failed"] == len(ran) and counts["graphs"] == 12 - len(ran)
    assert Schedule(Namespace(**{**options, "minutes": -1})).next() is None
