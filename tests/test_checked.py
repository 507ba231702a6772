"""What Triton made of a kernel's products is read when it is compiled, and refused if additions were moved."""

import re
import types

import pytest
import torch
import torch.nn.functional as F

from bi_inductor import BatchInvarianceError, doctor, inspect
from bi_inductor.offline import compile_offline, load_kernel
from bi_inductor.runtime import checked
from bi_inductor.runtime.assembled import intermediate
from bi_inductor.runtime.checked import CheckedKernel
from bi_inductor.templates import quantized_tiles
from bi_inductor.ttgir import wrong_sums
from bi_inductor.ttgir.accumulators import wrong_starts
from bi_inductor.ttgir.carried import lost_words

CHOICE = "acc = tl.where(acc == 0.0, 0.0, acc)"


def linear(k, dtype=torch.float32, dynamic=False):
    """The kernels of a product with a bias, of inner length ``k``."""
    x, weight, bias = (torch.randn(size, dtype=dtype) for size in [(55, k), (96, k), (96,)])
    return inspect(F.linear, x, weight, bias, target="sm_90", dynamic=dynamic).kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_triton_would_start_the_chain_from_is_refused(dtype):
    """``dot(a, b, 0) + 0.0 + bias``, of which Triton makes ``dot(a, b, bias)`` where K is one step."""
    ((name, source),) = linear(32, dtype).items()
    assert compile_offline({name: source}, "sm_90") and source.count(CHOICE) == 1
    with pytest.raises(BatchInvarianceError, match="accumulator starts as"):
        compile_offline({name: source.replace(CHOICE, "acc = acc + 0.0")}, "sm_90")


def test_a_chain_of_two_steps_hides_it():
    """What the last test replaces is no fault where K is longer: so it took a short K to find it."""
    ((name, source),) = linear(64).items()
    assert compile_offline({name: source.replace(CHOICE, "acc = acc + 0.0")}, "sm_90")


def test_every_tile_of_a_dynamic_graph_is_checked():
    ((name, source),) = linear(32, dynamic=True).items()
    kernel = load_kernel(source, name)
    assert isinstance(kernel, CheckedKernel) and len(kernel.choice.configs) > 5
    assert len(compile_offline({name: source}, "sm_90", every_config=True)) == len(kernel.choice.configs)


def test_kernels_of_attention_and_of_other_products_are_checked(monkeypatch):
    q, int8, ends = torch.randn(1, 4, 1, 64).bfloat16(), torch.ones(32, 64).to(torch.int8), torch.tensor([32])
    experts = torch.randn(1, 64, 32).bfloat16()
    graphs = [
        inspect(F.scaled_dot_product_attention, q, q, q, target="sm_90"),
        inspect(torch._int_mm, int8, int8.t(), target="sm_90"),
        inspect(torch._grouped_mm, experts[0].t(), experts, ends.int(), target="sm_90"),
    ]
    monkeypatch.setattr(
        checked, "wrong_sums", lambda *irs: ["a fault", "another"] * all("tt.func" in ir for ir in irs)
    )
    for graph in graphs:
        with pytest.raises(BatchInvarianceError, match="its GPU IR has a fault"):
            compile_offline(graph, "sm_90")


def test_a_kernel_for_inductors_launcher_is_read_beside_its_cubin(tmp_path):
    kernel = types.SimpleNamespace(cubin_path=str(tmp_path / "kernel.cubin"))
    for kind in ("ttgir", "ttir"):
        assert intermediate(kernel, kind) == ""  # Triton was told to keep binaries only
        (tmp_path / f"kernel.{kind}").write_text(kind)
        assert intermediate(kernel, kind) == kind
        assert intermediate(types.SimpleNamespace(asm={kind: "module {}"}), kind) == "module {}"


#: The loops over chunks, over runs of tiles and over the tiles of a run, and what each of them carries.
LOOPS = """
    %m = scf.for %chunk = %c0 to %n step %c1 iter_args(%m_ = %m0) -> ({0}) : i32 {{
      %seen:2 = scf.for %_ = %c0 to %runs step %c1 iter_args(%a = %m_) -> ({1}) : i32 {{
        %acc = scf.for %step = %c0 to %count step %c1 iter_args(%b = %a) -> ({2}) : i32 {{
        }} loc(#loc)
      }} loc(#loc)
    }} loc(#loc)
"""
ACC = "tensor<64x64xf32, #mma>"


@pytest.mark.parametrize(
    ("after", "is_lost"),
    [
        ((ACC, f"{ACC}, i64", ACC), False),
        ((ACC, f"{ACC}, i64", f"{ACC}, i32, !ttg.async.token"), False),
        ((ACC, ACC, ACC), True),
        ((ACC, ACC, f"{ACC}, i32, i64"), True),  # an address, which pipelining lets the loop over tiles carry
    ],
)
def test_a_word_that_a_loop_lost(after, is_lost):
    before = LOOPS.format(ACC, f"{ACC}, i64", ACC)
    assert bool(lost_words(before, LOOPS.format(*after))) == is_lost
    assert not lost_words(LOOPS.format(ACC, ACC, f"{ACC}, i64"), LOOPS.format(ACC, ACC, ACC))


#: A chain in a loop, then one more dot, in the way of a pipelined loop; ``{...}`` is filled in.
FUNCTION = """
module {{
  tt.func public @kernel(%bias: tensor<16x16xf32, #b>, %c: i1) {{
    %zero = arith.constant dense<{constant}> : tensor<16x16xf32, #mma>
    %start = {start}
    %acc:2 = scf.for %k = %c0 to %c9 step %c1 iter_args(%old = %start, %a = %a0) -> (t, i32) : i32 {{
      %acc = ttg.convert_layout %old : tensor<16x16xf32, #mma> -> tensor<16x16xf32, #blocked>
      %scaled = arith.mulf {product} : tensor<16x16xf32, #blocked>
      %new = tt.dot %x, %y, %scaled : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32, #mma>
      %next = scf.if %c -> (tensor<16x16xf32, #mma>) {{
        scf.yield %new : tensor<16x16xf32, #mma>
      }} else {{
        scf.yield {other} : tensor<16x16xf32, #mma>
      }}
      scf.yield %next, %a : tensor<16x16xf32, #mma>, i32
    }}
    %last = ttng.warp_group_dot %x, %y, %acc#0 {{isAsync = true}} : !ttg.memdesc<16x16xbf16> -> tensor<16x16xf32, #mma>
    tt.return
  }}
}}
"""


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, []),
        ({"constant": "0"}, []),
        ({"constant": "1.000000e+00"}, ["arith.constant"]),
        ({"start": "arith.addf %zero, %bias : tensor<16x16xf32, #mma>"}, ["arith.addf"]),
        ({"start": "arith.select %c, %zero, %zero : tensor<16x16xf32, #mma>"}, []),
        ({"start": "arith.select %c, %zero, %bias : tensor<16x16xf32, #mma>"}, ["an argument"]),
        ({"start": "tt.load %p : tensor<16x16x!tt.ptr<f32>, #mma>"}, ["tt.load"]),
        ({"other": "%bias"}, ["an argument"]),
        ({"start": '"tt.reduce"(%bias) <{axis = 0 : i32}> ({\n}) : (t) -> t'}, ['"tt.reduce"(%bias)']),
        ({"start": "tt.broadcast %zero : tensor<16x1xf32, #mma> -> tensor<16x16xf32, #mma>"}, []),
        (
            {"start": "tt.broadcast %bias : tensor<16x1xf32, #mma> -> tensor<16x16xf32, #mma>"},
            ["an argument"],
        ),
        ({"product": "%scale, %acc"}, []),
        ({"product": "%scale, %bias"}, ["an argument"]),
        ({"product": "%bias, %bias"}, ["an argument"]),
    ],
)
def test_an_accumulator_is_followed_to_what_it_starts_from(changed, wrong):
    parts = {
        "constant": "0.000000e+00",
        "start": "ttg.convert_layout %zero : tensor<16x16xf32>",
        "other": "%zero",
        "product": "%acc, %scale",
    }
    found = wrong_starts(FUNCTION.format(**{**parts, **changed}))
    assert found == [f"a dot whose accumulator starts as {start}, not as zero" for start in wrong]
    assert wrong_sums(FUNCTION.format(**{**parts, **changed})) == found


#: What is put in the place of a product's zeros, and what that is in TTGIR.
STARTS = {
    "ones": (r"tl.full((\1), 1.0, ACC_TYPE)", "arith.constant"),
    "a sum": (r"tl.load(A).to(ACC_TYPE) + tl.zeros((\1), ACC_TYPE)", "arith.addf"),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("k", [64, 512])
def test_registers_pipelines_and_tensor_memory_are_followed(k, target):
    x, weight = torch.randn(136, k).bfloat16(), torch.randn(k, 192).bfloat16()
    ((name, source),) = inspect(torch.matmul, x, weight, target=target).kernels.items()
    compile_offline({name: source}, target)
    for start, operation in STARTS.values():
        changed, count = re.subn(r"tl\.zeros\(\((.*?)\), ACC_TYPE\)", start, source)
        assert count
        with pytest.raises(BatchInvarianceError, match=f"accumulator starts as {re.escape(operation)}"):
            compile_offline({name: changed}, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_a_bias_is_found_on_other_targets(target):
    x, weight, bias = (torch.randn(size).bfloat16() for size in [(700, 64), (480, 64), (480,)])
    ((name, source),) = inspect(F.linear, x, weight, bias, target=target).kernels.items()
    compile_offline({name: source}, target)
    with pytest.raises(BatchInvarianceError, match="accumulator starts as"):
        compile_offline({name: source.replace(CHOICE, "acc = acc + 0.0")}, target)


def test_sums_of_integers_may_start_anywhere():
    """Triton starts them from what is added next, which is exact."""
    rows, columns, added = (
        torch.ones(40, 64).to(torch.int8),
        torch.ones(64, 48).to(torch.int8),
        torch.ones(40, 48),
    )
    (tile,) = [t for t in quantized_tiles.candidates("int8", 90) if (t.block_m, t.block_n) == (64, 16)]
    with doctor.chosen_in_turn("triton_quantized", "tile_for", [tile]):
        graph = inspect(lambda a, b, y: torch._int_mm(a, b) + y, rows, columns, added.int(), target="sm_90")
    assert compile_offline(graph, "sm_90")
