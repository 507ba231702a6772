"""What a doctor measured raises the level of the kernels it was measured for, on that GPU and those versions alone."""

import dataclasses
import functools
import json

import jsonschema
import pytest
import torch
import triton
from test_certificate import SCHEMA

from bi_inductor import __version__, certify, doctor, doctor_attention, inspect, measurement
from bi_inductor.certificate import Level
from bi_inductor.cli import main
from bi_inductor.measurement import DOCTOR_SCHEMA, Measurement, driver_version, tiles_of, with_measurement
from bi_inductor.measurement_attention import run_of
from bi_inductor.templates import quantized_tiles, tile_table

A, B = torch.randn(37, 256).bfloat16(), torch.randn(256, 64).bfloat16()


def written(**changes):
    """A doctor's JSON of an H100 on which every kind gave one class."""
    results = [
        {
            "kind": kind.name,
            "family": "wgmma k16",
            "tiles": len(kind.tiles(90)),
            "depths": kind.depths,
            "classes": [1] * len(kind.depths),
            "shapes": [tile.key for tile in kind.tiles(90)],
        }
        for kind in doctor.KINDS
    ]
    fields = {"schema": DOCTOR_SCHEMA, "gpu": "NVIDIA H100 80GB HBM3", "driver": "570.86.15",
              "batchinv": __version__, "torch": str(torch.__version__), "triton": triton.__version__,
              "agree": True, "results": results}  # fmt: skip
    return json.dumps({**fields, **changes})


def changed(kind, **fields):
    results = json.loads(written())["results"]
    return written(results=[{**each, **fields} if each["kind"] == kind else each for each in results])


def levels(fn, *args, text, **options):
    made = certify(fn, *args, batch_dim=None, measured=Measurement.from_json(text), **options)
    jsonschema.validate(json.loads(made.to_json()), SCHEMA)
    assert type(made).from_json(made.to_json()) == made
    return {
        entry.form.split("(")[0]: entry.level for entry in made.certificates[0].entries if entry.form
    }, made


def test_a_measured_product_is_raised_and_nothing_else():
    found, made = levels(lambda a, b: (a @ b).float().softmax(-1), A, B, text=written())
    assert found == {
        "Chain": Level.MEASURED.value,
        "Tree": Level.SOURCE.value,
        "Exact": Level.CONSTRUCTION.value,
    }
    assert [kernel.level for kernel in made.certificates[0].kernels] == [
        Level.MEASURED.value,
        Level.SOURCE.value,
    ]
    assert "measured on NVIDIA H100 80GB HBM3, driver 570.86.15" in str(made) and not made.measured.unused


def test_a_product_of_a_tensor_with_itself_is_raised():
    found, _ = levels(lambda x: x @ x.t(), A, text=written())
    assert found == {"Chain": Level.MEASURED.value}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (written(gpu="NVIDIA A100-SXM4-80GB"), "gpu NVIDIA A100-SXM4-80GB against NVIDIA H100"),
        (written(torch="2.10.0"), "torch 2.10.0 against"),
        (written(triton="3.5.0"), "triton 3.5.0 against"),
        (written(batchinv="0.0.1"), "batchinv 0.0.1 against"),
        (changed("bfloat16", classes=[1, 2, 1]), ""),
        (changed("bfloat16-unaligned", classes=[2, 1]), ""),
        (changed("bfloat16", shapes=[[64, 64, 0, 64, 8, 0, 0, 4, 3]]), ""),
        (written(results=[]), ""),
    ],
    ids=["gpu", "torch", "triton", "batchinv", "two classes", "two classes of the same form", "another tile",
         "nothing measured"],
)  # fmt: skip
def test_it_stays_lower(text, says):
    found, made = levels(torch.matmul, A, B, text=text)
    assert found == {"Chain": Level.SOURCE.value}
    assert says in made.measured.unused and bool(says) == bool(made.measured.unused)
    assert ("NOT USED" in str(made)) == bool(says)


def test_one_family_of_two_is_not_enough():
    """The doctor's rows of families agree by themselves; the kind as a whole does not."""
    results = json.loads(changed("bfloat16", classes=[2, 2, 2]))["results"]
    family = {**results[0], "classes": [1, 1, 1]}
    found, _ = levels(torch.matmul, A, B, text=written(results=[*results, family]))
    assert found == {"Chain": Level.SOURCE.value}


def test_another_driver_is_another_machine(monkeypatch, tmp_path):
    kernel_module = tmp_path / "version"
    monkeypatch.setattr(measurement, "_DRIVER", kernel_module)
    assert driver_version() == ""
    for line, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23", "570.86.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ):
        kernel_module.write_text(line)
        assert driver_version() == version
    found, made = levels(torch.matmul, A, B, text=written())
    assert found == {"Chain": Level.SOURCE.value}
    assert made.measured.unused == "driver 570.86.15 against 580.65.06"


def test_every_tile_of_a_dynamic_kernel_has_to_be_measured():
    (graph,) = inspect(torch.matmul, A, B, dynamic=True).graphs
    (text,) = graph.kernels.values()
    assert len(tiles_of(text)) >= 4
    found, _ = levels(
        torch.matmul, A, B, text=changed("bfloat16-unaligned", shapes=[*tiles_of(text)]), dynamic=True
    )
    assert found == {"Chain": Level.MEASURED.value}
    without_one = [*tiles_of(text)][1:]
    some = changed("bfloat16-unaligned", shapes=without_one)
    results = [{**each, "shapes": without_one} for each in json.loads(some)["results"]]
    found, _ = levels(torch.matmul, A, B, text=written(results=results), dynamic=True)
    assert found == {"Chain": Level.SOURCE.value}


def test_fp8_and_grouped_products_are_kinds_of_their_own():
    def scaled(x, weight, scale):
        return torch._scaled_mm(x, weight.t(), scale, scale, out_dtype=torch.float32)

    x, one = torch.randn(64, 64).to(torch.float8_e4m3fn), torch.ones(())
    assert levels(scaled, x, x.clone(), one, text=written())[0] == {"Chunks": Level.MEASURED.value}
    split = changed("float8_e4m3fn", classes=[1, 2, 1])
    assert levels(scaled, x, x.clone(), one, text=split)[0] == {"Chunks": Level.SOURCE.value}

    grouped = (
        torch.randn(40, 256).bfloat16(),
        torch.randn(2, 256, 64).bfloat16(),
        torch.tensor([8, 40]).int(),
    )
    for text, level in (
        (written(), Level.MEASURED),
        (changed("bfloat16-grouped", classes=[2, 1]), Level.SOURCE),
    ):
        found, _ = levels(lambda x, w, ends: torch._grouped_mm(x, w, offs=ends), *grouped, text=text)
        assert found == {"Chain": level.value}


def test_the_doctor_writes_the_tiles_it_ran():
    kind = doctor.KINDS[0]
    tiles = tile_table.candidates("bfloat16", 90)[:2]
    whole, first, _ = doctor.summarise(kind, [["a", "a"]] * 3, ["wgmma k16", "mma.sync k16"], tiles)
    assert whole.shapes == (tiles[0].key, tiles[1].key) and first.shapes == (tiles[0].key,)
    assert quantized_tiles.candidates("fp8", 90)[0].key


def test_the_command(tmp_path, capsys):
    script, file = tmp_path / "step.py", tmp_path / "h100.json"
    script.write_text(
        "import torch\ndef step(x, w):\n    return x @ w\n"
        "def example_inputs(batch):\n    return torch.randn(batch, 256).bfloat16(), torch.randn(256, 64).bfloat16()\n"
    )
    file.write_text(written())
    assert main(["certify", f"{script}:step", "--batch", "37", "--measured", str(file)]) == 0
    assert "measured on this GPU" in capsys.readouterr().out
    for text in ("{}", "[1]", "no JSON", written(results=[{"kind": "int8"}]), written(schema=0)):
        file.write_text(text)
        assert main(["certify", f"{script}:step", "--measured", str(file)]) == 2
        assert "no result of doctor" in capsys.readouterr().err


# Attention


def attention_results(*, runs=lambda run: True, classes=(1, 1), **changes):
    """What a doctor writes of attention: those ``runs`` of every kind, with ``changes`` in each."""
    return [
        {
            "kind": kind.name,
            "classes": classes,
            "runs": [{**dataclasses.asdict(run), **changes} for run in every_run(kind) if runs(run)],
        }
        for kind in doctor_attention.KINDS
    ]


@functools.cache
def every_run(kind):
    (result,) = doctor_attention.examine(kind, device="cpu", execute=without_running)
    return result.runs


def without_running(graph, inputs):
    return [[(q, q[..., 0]) for q, *_ in row] for row in inputs]


@pytest.fixture(scope="module")
def few_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_attention, "BATCH", 1)
        patch.setattr(doctor_attention, "HEADS", 2)
        yield


def attend(q, k, v, mask=None, causal=False, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def heads(queries, keys, width=64, dtype=torch.bfloat16):
    q, k = torch.randn(2, 8, queries, width, dtype=dtype), torch.randn(2, 2, keys, width, dtype=dtype)
    return q, k, k + 1


def attention_level(name, *, results, **changes):
    """Of the op and its kernels, after a doctor whose ``results`` these are."""
    graph = generated(name)
    measured = Measurement.from_json(written(results=results, **changes))
    made = with_measurement(graph.certificate, graph.source, measured)
    found = {claim.level for claim in made.entries + made.kernels if "Attention" in str(claim)}
    (level,) = found
    return level


@functools.cache
def generated(name):
    fn, *args = ATTENTION[name]
    (graph,) = inspect(fn, *args).graphs
    return graph


def attend_itself(x):
    """Queries, keys and values in one tensor, as one projection leaves them: three operands, one argument."""
    return attend(*x.unflatten(-1, (3, 8, 64)).permute(2, 0, 3, 1, 4), causal=True)


VISIBLE = torch.ones(1, 600, dtype=torch.bool)
MEASURED = {
    "decoding": (attend, *heads(1, 600)),
    "prefill": (lambda *x: attend(*x, causal=True), *heads(200, 200)),
    "prefill of few keys": (lambda *x: attend(*x, causal=True), *heads(100, 100)),
    "one projection": (attend_itself, torch.randn(2, 100, 3 * 8 * 64).bfloat16()),
    "bools": (attend, *heads(1, 600), VISIBLE),
    "floats": (attend, *heads(1, 600), VISIBLE.bfloat16()),
    "wide heads": (attend, *heads(1, 600, width=256)),
    "head dim 128": (attend, *heads(1, 600, width=128), VISIBLE),
    "fp16": (attend, *heads(64, 64, dtype=torch.float16)),
    "fp32": (attend, *heads(64, 64, dtype=torch.float32)),
}
UNKNOWN_TO_DOCTORS = {
    "prefill by warps of two kinds": (lambda *x: attend(*x, causal=True), *heads(600, 600)),
    "floats with a scale that rounds": (attend, *heads(1, 600, width=128), VISIBLE.bfloat16()),
    "head dim 63": (attend, *heads(1, 600, width=63)),
    "values of another width": (attend, *heads(1, 600)[:2], torch.randn(2, 2, 600, 128).bfloat16()),
    "wider floats": (attend, *heads(1, 600), VISIBLE.float()),
    "scaled": (functools.partial(attend, scale=0.1), *heads(1, 600)),
}
ATTENTION = MEASURED | UNKNOWN_TO_DOCTORS


@pytest.mark.parametrize("name", MEASURED)
def test_measured_attention_is_raised(name, few_rows):
    assert attention_level(name, results=attention_results()) == Level.MEASURED.value


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("decoding", {"classes": (1, 2)}),
        ("decoding", {"runs": lambda run: not run.split}),
        ("decoding", {"runs": lambda run: run.block_m != 16}),
        ("decoding", {"runs": lambda run: run.mask != "none"}),
        ("decoding", {"num_warps": 16}),
        ("decoding", {"num_stages": 9}),
        ("decoding", {"dtype": "float16"}),
        ("decoding", {"scale": 1.0}),
        ("decoding", {"head_dim": 128}),
        ("decoding", {"form": "Attention(float32, 64, 1024, 8192, 2048)"}),
        ("prefill", {"runs": lambda run: not run.causal}),
        ("bools", {"runs": lambda run: run.mask != "bool"}),
        ("floats", {"runs": lambda run: run.mask == "bool"}),
        ("fp32", {"form": "Attention(tf32/float32, 32, 512, 8192, 2048)"}),
    ],
    ids=["two classes", "no split", "no tile of 16", "only masks", "warps", "stages", "dtype", "scale", "head dim",
         "chunks", "not causal", "no bools", "only bools", "tf32"],
)  # fmt: skip
def test_attention_stays_lower(name, results, few_rows):
    assert attention_level(name, results=attention_results(**results)) == Level.SOURCE.value


@pytest.mark.parametrize("name", UNKNOWN_TO_DOCTORS)
def test_attention_that_no_doctor_runs_stays_lower(name, few_rows):
    assert attention_level(name, results=attention_results()) == Level.SOURCE.value


@pytest.mark.parametrize(
    "changes", [{"gpu": "NVIDIA A100-SXM4-80GB"}, {"triton": "3.5.0"}], ids=["gpu", "triton"]
)
def test_attention_of_another_machine_stays_lower(changes, few_rows):
    level = attention_level("decoding", results=attention_results(), **changes)
    assert level == Level.SOURCE.value


def test_one_kind_that_disagrees_takes_its_heads_with_it(few_rows):
    """Whatever a second result, with the same heads, says of the same schedules."""
    results = attention_results()
    wrong = {**results[0], "classes": [2], "runs": results[0]["runs"][:1]}
    assert attention_level("decoding", results=[*results, wrong]) == Level.SOURCE.value


@pytest.mark.parametrize("kind", doctor_attention.KINDS, ids=lambda kind: kind.name)
def test_the_doctor_writes_the_kernels_it_compiled(kind, few_rows):
    """What is read from the text of each kernel of its graph is what its result says was run, in the same order."""
    compiled = []

    def generate(graph, inputs):
        compiled.extend(inspect(graph, inputs, target="sm_90").graphs)
        return without_running(graph, inputs)

    kind = dataclasses.replace(kind, depths=(70,))
    (result,) = doctor_attention.examine(kind, kind.schedules[:2], device="cpu", execute=generate)
    (graph,) = compiled
    ops = [entry for entry in graph.certificate.entries if entry.form]
    read = [
        run_of([graph.kernels[k.name] for k in graph.certificate.kernels if entry.name in k.ops], entry.form)
        for entry in ops
    ]
    assert read == [*result.runs] and len(read) == 8 + 2 * kind.float_masks


def test_a_kernel_of_several_layers_speaks_for_each(few_rows):
    def layers(q, k, v):
        for _ in range(3):
            q = attend(q, k, v).sin()
        return q

    for results, level in (([], Level.SOURCE), (attention_results(), Level.MEASURED)):
        measured = Measurement.from_json(written(results=results))
        made = certify(layers, *heads(1, 600), batch_dim=None, measured=measured)
        assert [entry.level for entry in made.certificates[0].entries if entry.form] == [level.value] * 3


@pytest.mark.lengthy
def test_no_doctor_ran_a_graph_with_warps_of_two_kinds():
    """Of its kernels the one for fewer queries is among a doctor's; the other is not."""
    (graph,) = inspect(
        functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True),
        *(torch.empty(1, 64, 300, 64, dtype=torch.bfloat16) for _ in range(3)),
        dynamic=True,
    ).graphs
    (entry,) = [entry for entry in graph.certificate.entries if "attention" in entry.op]
    kernels = [text for text in graph.kernels.values() if "attention" in text]
    one_kind, two_kinds = kernels
    assert "attend(" in two_kinds and run_of([one_kind], entry.form) is not None
    assert run_of(kernels, entry.form) is None and run_of([two_kinds], entry.form) is None
