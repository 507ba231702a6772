"""An addition that ptxas loses, in kernels of some tiles: it is taken apart before."""

import os
import pickle
import re
import subprocess
import types

import pytest
import torch
import triton
from devices import compiled, random_rows
from packaging.version import Version
from torch._inductor.runtime import triton_heuristics

from bi_inductor import inspect
from bi_inductor.offline import compile_offline, load_kernel
from bi_inductor.runtime import assembled
from bi_inductor.runtime.assembled import apart
from bi_inductor.testing import same_bits
from bi_inductor.virtual import virtual_gpu

#: An addition of two 16-bit integers whose constant is gone.
LOST = re.compile(r"VIADD\.16x2 \w+, \w+(?:\.reuse)?, 0x0 ;")
#: Whether this Triton's LLVM writes additions of such pairs for the kernels below at all.
ARE_WRITTEN = Version(triton.__version__) < Version("3.8")


def sums(x):
    return x.cumsum(1)


def kernels_of_sums(*shape):
    x = torch.randn(shape)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return inspect(sums, x, target="sm_90").kernels


def forced(monkeypatch, elements, num_warps):
    """Kernels without a sum have so many ``elements`` per thread."""
    config = triton_heuristics.Config(
        {"XBLOCK": elements * 32 * num_warps}, num_warps=num_warps, num_stages=1
    )
    monkeypatch.setattr(triton_heuristics, "triton_config", lambda *args, **kwargs: config)


def instructions(kernel, tmp_path):
    """What the machine executes, as nvdisasm writes it."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.cubin)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    return subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=True).stdout


def test_no_kernel_has_lost_an_addition(monkeypatch, tmp_path):
    forced(monkeypatch, 2, 2)

    def found():
        return [
            instructions(kernel, tmp_path) for kernel in compile_offline(kernels_of_sums(7, 5, 5), "sm_90")
        ]

    assert not any("VIADD.16x2" in code for code in found())
    monkeypatch.setattr(assembled, "mended", lambda kernel: {})
    assert any(map(LOST.search, found())) == ARE_WRITTEN


@pytest.mark.parametrize("level", [None, "--opt-level 1"])
def test_a_lower_level_is_no_remedy(level, monkeypatch, tmp_path):
    """Of these two kernels each loses one at the level at which the other loses none."""
    monkeypatch.setattr(assembled, "mended", lambda kernel: {"ptx_options": level} if level else {})
    lost = []
    for shape, elements, num_warps in [((7, 5, 5), 2, 2), ((7, 4097), 2, 8)]:
        forced(monkeypatch, elements, num_warps)
        made = compile_offline(kernels_of_sums(*shape), "sm_90")
        lost.append(any(LOST.search(instructions(kernel, tmp_path)) for kernel in made))
    assert lost == [ARE_WRITTEN and level is None, ARE_WRITTEN and level is not None]


def test_where_no_ptx_is_left_the_instructions_are_read(monkeypatch, tmp_path):
    forced(monkeypatch, 2, 2)
    monkeypatch.setattr(assembled, "intermediate", lambda kernel, kind: "")
    made = compile_offline(kernels_of_sums(7, 5, 5), "sm_90")
    assert not any(LOST.search(instructions(kernel, tmp_path)) for kernel in made)
    assert any("VIADD.16x2" in instructions(kernel, tmp_path) for kernel in made) == ARE_WRITTEN
    assert assembled.mended(types.SimpleNamespace(asm={"hsaco": b""})) == {}


PTX = """
	mov.b32 	%r52, 65537;
	add.s16x2 	%r53, %r51, %r52;
	@%p1 bra 	$L1;
"""


def test_a_pair_is_taken_apart():
    made = apart(PTX)
    assert "add.s16x2" not in made and made.count("add.s16 ") == 2
    assert made.startswith(PTX[: PTX.index("add")]) and made.endswith(PTX[PTX.index("\t@") :])
    assert apart(made) == made and apart("\tadd.s32 \t%r1, %r2, %r3;") == "\tadd.s32 \t%r1, %r2, %r3;"
    predicated = types.SimpleNamespace(asm={"ptx": "@%p1 add.s16x2 %r1, %r2, %r3;"})
    assert assembled.mended(predicated) == {"ptx_options": "--opt-level 0"}


def test_other_kernels_are_assembled_once(monkeypatch):
    options = []
    create = triton_heuristics.CachingAutotuner._create_compile_options

    def noted(self, *args, **kwargs):
        options.append(create(self, *args, **kwargs))
        return options[-1]

    monkeypatch.setattr(triton_heuristics.CachingAutotuner, "_create_compile_options", noted)
    compile_offline(inspect(torch.sin, torch.randn(7, 40), target="sm_90"), "sm_90")
    assert len(options) == 1 and not options[0].get("ir_override")


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize(
    "graph",
    [
        torch.sin,
        lambda x: x.sum(1),
        lambda x: x.sum(0),
        lambda x: torch.cat([x[i % 7] for i in range(20)]),  # several kernels in one
        lambda x: x @ x.t(),
        lambda x: (x @ x.t()).softmax(1),
    ],
)
def test_every_emitted_kernel_is_assembled_so(graph, profiled):
    with torch._inductor.config.patch(profile_bandwidth=profiled):
        kernels = inspect(graph, torch.randn(7, 40), target="sm_90").kernels
    assert kernels
    with virtual_gpu("sm_90"):
        for name, source in kernels.items():
            kernel = load_kernel(source, name)
            kernel.prepare_for_pickle()  # as a process that compiles for this one sends it
            assert isinstance(pickle.loads(pickle.dumps(kernel)), assembled.Assembled)


@pytest.mark.gpu
@pytest.mark.parametrize(("elements", "num_warps"), [(1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 4)])
def test_every_tile_gives_the_same_bits(elements, num_warps, monkeypatch):
    """Forward and gradient of a scan, whose places are small numbers; with the guard off two of the tiles do not."""
    x, upstream = (random_rows(7, 5, 5, device="cuda", seed=seed) for seed in range(2))

    def gradients():
        torch._dynamo.reset()
        leaf = x.clone().requires_grad_()
        torch._dynamo.maybe_mark_dynamic(leaf, 0)
        with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
            result = compiled(sums)(leaf)
            return torch.stack([result.detach(), *torch.autograd.grad(result, leaf, upstream)])

    expected = gradients()
    assert same_bits(expected[0], torch.cat([compiled(sums, dynamic=False)(row[None]) for row in x]))
    forced(monkeypatch, elements, num_warps)
    assert same_bits(gradients(), expected)
    has_pairs = ARE_WRITTEN and torch.cuda.get_device_capability() >= (9, 0)
    if has_pairs and elements == 2 and num_warps > 1:
        monkeypatch.setattr(assembled, "mended", lambda kernel: {})
        assert not same_bits(gradients(), expected)
