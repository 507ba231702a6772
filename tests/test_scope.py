"""Stock Inductor before, during and after our compiles: the same generated code, in every thread."""

import re
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from devices import compiled
from torch._inductor.utils import run_and_get_code

from bi_inductor import _compat, scope
from bi_inductor.options import Options


def graph(x, w):
    return F.layer_norm(x @ w, (32,)).softmax(-1).sum(0)


ARGUMENTS = (torch.randn(7, 16), torch.randn(16, 32))


def stock_code():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _, code = run_and_get_code(torch.compile(graph, backend="inductor"), *ARGUMENTS)
    return [re.sub(r"# AOT ID: .*", "", text) for text in code]  # a counter of the process's graphs


def installed_objects():
    from torch._inductor import compile_fx, ir, lowering, output_code, scheduler, tiling_utils
    from torch._inductor.codegen import cpp

    compared = [tiling_utils.get_pw_red_splits] if _compat.compares_sizes_as_written() else []
    return [
        *compared,
        compile_fx.GraphLowering,
        cpp.stride_at_vec_range,
        vars(ir.Reduction)["create"],
        lowering.use_two_step_variance,
        lowering.get_constant_value,
        output_code.CompiledFxGraph.post_compile,
        scheduler.get_scheduling_for_device,
    ]


def test_stock_code_is_the_same_before_and_after():
    before, objects = stock_code(), installed_objects()
    torch._dynamo.reset()
    compiled(graph)(*ARGUMENTS)
    assert installed_objects() == objects
    assert stock_code() == before


def test_stock_code_is_the_same_in_another_thread_meanwhile():
    """A compile that another thread starts inside our scope waits for its end, or is not touched by it."""
    before, during = stock_code(), []
    thread = threading.Thread(target=lambda: during.append(stock_code()))
    with scope.compiling(Options()):
        thread.start()
        time.sleep(1)
    thread.join()
    assert during == [before]


def test_delegates_are_for_the_compiling_thread_alone():
    from torch._inductor import scheduler

    seen = {}
    with scope.compiling(Options()):
        seen["ours"] = scheduler.get_scheduling_for_device("cpu")
        thread = threading.Thread(
            target=lambda: seen.update(other=scheduler.get_scheduling_for_device("cpu"))
        )
        thread.start()
        thread.join()
    assert seen["ours"].__module__.startswith("bi_inductor")
    assert seen["other"].__module__.startswith("torch.")
    assert seen["other"] is scheduler.get_scheduling_for_device("cpu")


def test_everything_is_restored_when_a_compile_fails():
    objects = installed_objects()
    with pytest.raises(RuntimeError, match="inside"), scope.compiling(Options()):
        assert all(a is not b for a, b in zip(installed_objects(), objects, strict=True))
        raise RuntimeError("inside")
    assert installed_objects() == objects
    assert torch._inductor.config.pattern_matcher


def test_scopes_nest_and_the_last_one_out_restores():
    objects = installed_objects()
    with scope.compiling(Options()):
        inside = installed_objects()
        with scope.compiling(Options(unproven="warn")):
            assert installed_objects() == inside
            assert scope._options().unproven == "warn"
        assert installed_objects() == inside
        assert scope._options().unproven == "refuse"
    assert installed_objects() == objects


def test_a_backward_compiled_later_is_ours():
    """The gradient is asked for outside any scope; its code must have our sums all the same."""
    x = torch.randn(5, 300, requires_grad=True)
    fn = compiled(lambda x: F.layer_norm(x, (300,)).pow(3).mean(-1))
    result = fn(x)
    assert scope._options() is None
    _, code = run_and_get_code(lambda: result.sum().backward())
    assert "batchinv certificate" in code[0]
