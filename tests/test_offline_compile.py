"""Emitted kernels go through ptxas for every GPU generation, and their sums stay sums after it."""

import re

import pytest
import torch
from inspected import REDUCTIONS, WIDTH, Block

from bi_inductor import OptionError, doctor, inspect
from bi_inductor.offline import compile_offline
from bi_inductor.ops import bmm_wide
from bi_inductor.templates import tile_table

TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"])
def test_a_model_compiles_to_cubins(target):
    inspection = inspect(Block().bfloat16(), torch.randn(64, WIDTH).bfloat16(), target=target)
    compiled = compile_offline(inspection, target)
    assert [kernel.name for kernel in compiled] == list(inspection.kernels)
    for kernel in compiled:
        assert kernel.cubin[:4] == b"\x7fELF"
        assert f".target {target}" in kernel.ptx
        assert 0 < kernel.registers <= 255 and not kernel.spills
        assert kernel.name in str(kernel)
    assert any("mma" in kernel.ptx for kernel in compiled)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["sum inner", "sum outer", "sum all", "softmax", "layer_norm", "argmax", "prod"]
)
def test_reductions_compile_to_cubins(name, target):
    for length in (300, 5000):
        inspection = inspect(REDUCTIONS[name], torch.randn(100, length), target=target)
        for kernel in compile_offline(inspection, target):
            assert f".target {target}" in kernel.ptx
            assert not kernel.spills, str(kernel)


@pytest.mark.lengthy
def test_training_compiles_to_cubins_and_says_what_it_takes():
    inspection = inspect(Block().bfloat16(), torch.randn(64, WIDTH).bfloat16(), backward=True)
    compiled = compile_offline(inspection)
    assert [kernel.name for kernel in compiled] == list(inspection.kernels)
    for kernel in compiled:
        needs = kernel.resources()
        assert needs["name"] == kernel.name and needs["registers"] == kernel.registers > 0
        assert needs["spills"] is kernel.spills is False and needs["shared_bytes"] == kernel.shared_bytes


@pytest.mark.lengthy
@pytest.mark.parametrize("columns", [640, 616])
def test_a_product_of_one_step_fits_the_shared_memory(columns):
    """Scores of heads of 64 elements, in fp32: with more stages than steps four tiles took more than a block may."""
    large = [tile for tile in tile_table.candidates("float16", 90, wide=True) if tile.columns > 128]
    assert len(large) >= 4
    for tile in [tile_table.shortened(tile, 64) for tile in large]:
        with doctor.chosen_in_turn("triton_matmul", "tile_for", [tile]):
            operands = torch.empty(2, 500, 64).half(), torch.empty(2, 64, columns).half()
            made = inspect(bmm_wide, *operands, target="sm_90", dynamic=False)
        (kernel,) = compile_offline(made, "sm_90")
        assert kernel.shared_bytes <= tile_table._SHARED_BYTES[90], (tile, kernel)


def test_no_multiply_is_contracted_into_an_addition():
    inspection = inspect(lambda x, y: x * y + 1.5, torch.randn(64, 64), torch.randn(64, 64))
    (kernel,) = compile_offline(inspection)
    assert not re.search(r"\bfma\b", kernel.ptx)
    assert re.search(r"\bmul", kernel.ptx) and re.search(r"\badd", kernel.ptx)


def test_every_configuration_of_a_heuristic():
    inspection = inspect(lambda x: x.sin() + 1, torch.randn(1000, 5000))
    first, every = compile_offline(inspection), compile_offline(inspection, every_config=True)
    assert len(every) > len(first) == 1
    assert len({kernel.config for kernel in every}) == len(every)


def test_sources_by_name_and_whole_modules():
    inspection = inspect(lambda x: x.sum(-1), torch.randn(8, 64))
    for form in (inspection.kernels, inspection.source):
        (kernel,) = compile_offline(form)
        assert kernel.name == next(iter(inspection.kernels))


def test_unknown_target():
    with pytest.raises(OptionError, match="known are"):
        compile_offline({}, "sm_70")
