"""Which schedule a reduction gets on a GPU: fused where a row fits one program, split where few rows are long.

Read off the code generated for an H100. None of it can change a bit (``test_schedules_gpu.py``); it is speed.
"""

import pytest
import torch
import torch.nn.functional as F

from bi_inductor import choices, inspect


def emitted(fn, *shape):
    return inspect(fn, torch.empty(*shape, dtype=torch.bfloat16), target="sm_90")


ROW_FUNCTIONS = {
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
}


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 4096), (4096, 4096), (2048, 128256), (20000, 40000)])
def test_all_passes_over_a_row_share_a_kernel(name, shape):
    assert len(emitted(ROW_FUNCTIONS[name], *shape).kernels) == 1


@pytest.mark.parametrize(("name", "shape"), [("softmax", (16, 128256)), ("rms_norm", (1, 131072))])
def test_few_long_rows_are_split_over_programs(name, shape, monkeypatch):
    split = emitted(ROW_FUNCTIONS[name], *shape)
    assert len(split.kernels) > 1
    monkeypatch.setattr(choices, "LOOPED_ROWS_PER_SM", 0)
    whole = emitted(ROW_FUNCTIONS[name], *shape)
    assert len(whole.kernels) == 1 and whole.fingerprint == split.fingerprint


def test_a_sum_of_one_long_row_is_cut_at_subtree_borders():
    first, second = emitted(lambda x: x.sum(-1, dtype=torch.float32), 1, 131072).kernels.values()
    assert "size_hints={'x': 32, 'r0_': 4096}" in first
    assert "size_hints={'x': 1, 'r0_': 32}" in second


@pytest.mark.parametrize("columns", [300, 9000])
def test_a_long_column_sum_is_split_however_many_columns(columns):
    kernels = emitted(lambda x: x.sum(0), 60000, columns).kernels
    assert len(kernels) > 1 and "ReductionHint.OUTER" in next(iter(kernels.values()))
