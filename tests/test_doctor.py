"""The doctor finds tiles that disagree; and no selectable tile is of another family than its dtype is pinned to."""

import json
import os

import pytest
import torch
from test_scaled_matmul import families

from bi_inductor import BatchInvarianceError, cli, doctor, inspect, verifier
from bi_inductor.commands import doctor as command
from bi_inductor.inspection import kernel_definitions
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.templates import mma_family, quantized_tiles, tile_table
from bi_inductor.templates.tile_table import Tile
from bi_inductor.testing import BATCH_LADDER

FP8 = next(kind for kind in doctor.KINDS if kind.name == "float8_e4m3fn")


def small(kind, depth):
    """``kind`` with one short K, for the interpreter."""
    return doctor.dataclasses.replace(kind, depths=(depth,))


@pytest.fixture
def few_outputs(monkeypatch):
    monkeypatch.setattr(doctor, "ROWS", 20)
    monkeypatch.setattr(doctor, "COLUMNS", 48)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-grouped", "float32", "int8", "float8_e4m3fn"])
def test_agreement_is_one_class(name, few_outputs):
    kind = next(kind for kind in doctor.KINDS if kind.name == name)
    tiles = dict.fromkeys(kind.tiles(90))
    (result,) = doctor.examine(
        small(kind, 48), list(tiles)[::3], device="cpu", execute=lambda *x: run_in_interpreter(*x)
    )
    assert result.classes == (1,) and result.agrees and result.tiles == len(list(tiles)[::3]) >= 2


def test_a_tile_that_computes_something_else_is_a_second_class(few_outputs):
    """Teeth: fp8 promoted after 64 of K instead of 128 is another sum."""
    tiles = [Tile(64, 64, 128, 4, 2), Tile(64, 64, 64, 4, 2), Tile(64, 16, 128, 4, 2)]

    def unverified(*graph):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bi_inductor.verifier.check", verifier.examine)
            return run_in_interpreter(*graph)

    (result,) = doctor.examine(small(FP8, 304), tiles, device="cpu", execute=unverified)
    assert result.classes == (2,) and not result.agrees


def test_the_report():
    results = doctor.summarise(
        doctor.dataclasses.replace(FP8, depths=(48, 96)),
        [["a", "a", "b"], ["c", "c", "c"]],
        ["wgmma k32", "wgmma k32", "mma.sync k16"],
    )
    assert [(r.family, r.tiles, r.classes, r.agrees) for r in results] == [
        ("wgmma k32 + mma.sync k16", 3, (2, 1), False),
        ("wgmma k32", 2, (1, 1), True),
        ("mma.sync k16", 1, (1, 1), True),
    ]
    assert not command.agree(results) and command.agree(results[1:])
    assert "DISAGREE for float8_e4m3fn" in command.verdict(results)
    assert "contract holds" in command.verdict(results[1:])
    head, *rows = command.table(results).splitlines()
    assert head.split()[:2] == ["kind", "instructions"]
    assert [row.split()[-1] for row in rows] == ["DIFFER", "ok", "ok"]


def length(name):
    """In the place of an examination; runs in a process of its own."""
    if name == "refused":
        raise BatchInvarianceError("aten::op", "of a reason", "a remedy", "model.py:3")
    return [os.getpid(), len(name), torch._inductor.config.compile_threads]


@pytest.mark.lengthy
def test_kinds_side_by_side_give_what_they_give_one_after_the_other(capsys):
    names = ["a", "bcd", "ef"]
    own, first, second = (
        command.examine_all(names, length),
        *(command.examine_all(names, length, workers=n) for n in (2, 3)),
    )
    assert own[1::3] == first[1::3] == second[1::3] == [1, 3, 2]
    assert set(own[::3]) == {os.getpid()} and not {os.getpid()} & {*first[::3], *second[::3]}
    assert first[2::3] == [1, 1, 1] and len(set(second[::3])) > 1
    assert capsys.readouterr().err.count("done, 3 of 3 ...") == 2
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ


@pytest.mark.lengthy
def test_an_error_of_a_worker_keeps_its_parts():
    with pytest.raises(BatchInvarianceError) as caught:
        command.examine_all(["a", "refused"], length, workers=2)
    assert (caught.value.reason, caught.value.source) == ("of a reason", "model.py:3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_there_is_one_line(capsys):
    assert cli.main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "no GPU" in captured.err


@pytest.mark.gpu
def test_the_doctor_on_this_gpu(capsys):
    assert cli.main(["doctor", "--json", "--kinds", "int8,float8_e4m3fn"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agree"] and {result["kind"] for result in report["results"]} == {"int8", "float8_e4m3fn"}
    assert not any("unknown" in result["family"] for result in report["results"])
    assert cli.main(["doctor", "--kinds", "float7"]) == 2


def test_what_is_compiled_is_known_by_its_source():
    """Where nothing is cached: of it the report's names of instructions are made."""
    x = torch.randn(3, 5)
    with doctor.prepared("triton_matmul", "tile_for", [], tf32=False) as sources:
        torch.compile(lambda x: x.sum(-1), backend="batchinv")(x)
        torch.compile(lambda x: x.amax(-1), backend="inductor")(x)
    torch.compile(lambda x: x.prod(-1), backend="batchinv")(x)
    (source,) = sources
    assert [*kernel_definitions(source)] == ["cpp_fused_sum_0"]


# No tile of another family


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103])
@pytest.mark.parametrize("kind", doctor.KINDS, ids=lambda kind: kind.name)
def test_selectable_tiles_are_of_one_family(kind, capability):
    tiles = set(kind.tiles(capability))
    if kind.dtype.itemsize == 1 and kind.dtype != torch.int8:
        found = {mma_family.fp8_family_of(tile, capability) for tile in tiles}
        assert found == {mma_family.fp8_family(capability)}
    elif kind.name not in ("float32", "float64", "int8"):  # FMA and DMMA whatever the tile; exact
        assert len({mma_family.family_of(tile, capability) for tile in tiles}) == 1, tiles


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_selector_returns_selectable_tiles_only(capability):
    """K may shorten a step of a chain, which is no other family; nothing else is changed."""
    sizes = {"sm_count": 132, "capability": capability}
    for m in (0, *BATCH_LADDER, 8192):
        for n, k in [(1, 17), (16, 4096), (512, 48), (28672, 4096)]:
            for dtype in ("bfloat16", "float32", "float64"):
                tile = tile_table.tile_for(m, n, k, dtype, tma=True, wide=True, **sizes)
                possible = tile_table.candidates(dtype, capability, tma=True, wide=True)
                shortened = [tile_table.shortened(candidate, k) for candidate in possible]
                assert tile in shortened and all(
                    doctor.dataclasses.replace(b, block_k=a.block_k, num_stages=a.num_stages) == a
                    for a, b in zip(possible, shortened, strict=True)
                )
            for name in quantized_tiles.KINDS:
                tile = quantized_tiles.tile_for(m, n, k, name, **sizes)
                assert tile in quantized_tiles.candidates(name, capability)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_families_are_read_from_ptx(target):
    """Of a whole module, product by product; what else is in it is left out."""
    tiles = [Tile(16, 64, 64, 4, 3, swap=True), Tile(16, 32, 64, 4, 3)]
    a, b = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()

    def graph(x, y, weight):
        return x @ weight.t(), y @ weight.t(), x.float().sum(-1)

    with doctor.chosen_in_turn("triton_matmul", "tile_for", tiles):
        source = inspect(graph, a, a + 1, b, target=target).source
    wide = "wgmma k16" if target == "sm_90" else "mma.sync k16"
    assert doctor.instructions(source, 2, target) == [wide, "mma.sync k16"]
    assert doctor.instructions(source, 1, target) == doctor.instructions(source, 2, target, step=2) == [wide]
    assert doctor.instructions(source, 2, "sm_120") == ["unknown", "unknown"]
    assert families("wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3") == {"wgmma_k32"}
