"""A virtual GPU answers for the thread that opened it, and nothing of it is left behind."""

import re
import threading

import pytest
import torch
from torch._dynamo.device_interface import CudaInterface, get_interface_for_device
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from bi_inductor import OptionError, inspect
from bi_inductor.targets import TARGETS
from bi_inductor.virtual import forget_memoised_answers, virtual_gpu

CUDA = torch.device("cuda", 0)


def world():
    """What this process says of its GPU, by every road that Inductor and Triton take."""
    import triton
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch.utils._triton import has_triton

    answers = {
        name: getattr(torch.cuda, name) for name in ("is_available", "get_device_properties", "_lazy_init")
    }
    return {
        **answers,
        "available": torch.cuda.is_available(),
        "count": torch.cuda.device_count(),
        "interface": get_interface_for_device("cuda"),
        "driver": triton.runtime.driver._active,
        "has_triton": has_triton(),
        "avoid_device_init": FakeTensorMode.avoid_device_init,
        "lazy_init": (joint_graph.lazy_init, post_grad.lazy_init),
        "set_driver": triton_helpers.set_driver_to_gpu,
        "warning": compile_fx._warn_tf32_disabled,
    }


@pytest.mark.parametrize("target", TARGETS)
def test_it_answers_for_its_target(target):
    import triton

    major, minor = TARGETS[target].capability
    with virtual_gpu(target) as device:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_capability() == (major, minor)
        assert torch.cuda.get_device_properties(0).multi_processor_count == device.multi_processor_count
        assert triton.runtime.driver.active.get_current_target().arch == 10 * major + minor
        assert DeviceProperties.create(CUDA).cc == 10 * major + minor


def test_everything_is_as_before():
    before = world()
    with virtual_gpu("sm_90"):
        assert world() != before
    assert world() == before


def test_everything_is_as_before_after_an_exception():
    before = world()
    with pytest.raises(ZeroDivisionError), virtual_gpu("sm_90"):
        raise ZeroDivisionError
    assert world() == before


def test_nested_targets():
    with virtual_gpu("sm_90"):
        with virtual_gpu("sm_80"):
            assert DeviceProperties.create(CUDA).cc == 80
        assert torch.cuda.get_device_capability() == (9, 0)
        assert DeviceProperties.create(CUDA).cc == 90


def test_memoised_answers_of_one_target_do_not_reach_the_next():
    counts = []
    for target in ("sm_80", "sm_90"):
        with virtual_gpu(target):
            counts.append(DeviceProperties.create(CUDA).multi_processor_count)
    assert counts == [108, 132]


def test_memos_are_found():
    """The names of what is memoised are Inductor's own: this notices when they move."""
    with virtual_gpu("sm_90"):
        DeviceProperties.create(CUDA)
        memo = vars(DeviceProperties)["create"].__func__
        assert memo.cache_info().currsize
        forget_memoised_answers()
        assert not memo.cache_info().currsize


def test_other_threads_see_the_real_machine():
    import triton

    real, seen = torch.cuda.is_available(), {}

    def look():
        seen["available"] = torch.cuda.is_available()
        seen["interface"] = get_interface_for_device("cuda")
        try:
            seen["driver"] = triton.runtime.driver.active.get_current_target().arch
        except RuntimeError:  # this machine has no GPU
            seen["driver"] = None

    with virtual_gpu("sm_100"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert torch.cuda.is_available()
    assert seen["available"] == real
    assert seen["interface"] is CudaInterface
    assert seen["driver"] != 100


@pytest.mark.parametrize("target", ["sm_91", "H100", "cuda", ""])
def test_unknown_targets_are_refused(target):
    with pytest.raises(OptionError, match="sm_90"), virtual_gpu(target):
        pass


def stock_code():
    """What stock Inductor generates on the CPU, without the counter of compiles and the cache's paths."""

    def fn(x, w):
        return torch.softmax(torch.nn.functional.gelu(x @ w), -1).sum(0)

    torch._dynamo.reset()
    with fresh_cache():
        _, (code,) = run_and_get_code(
            torch.compile(fn, backend="inductor"), torch.ones(8, 32), torch.ones(32, 16)
        )
    return re.sub(r"# (AOT ID|kernel path).*|/\S*\.(py|h)\b", "", code)


def test_stock_inductor_emits_the_same_bytes_before_and_after():
    before = stock_code()
    inspect(lambda x: torch.softmax(x, -1) @ x.t(), torch.randn(8, 32), target="sm_90")
    assert stock_code() == before


def test_fake_cuda_tensors_can_be_indexed_and_made_from_data():
    """In a CPU build the first of these ends in an error without ``device_guard.py``."""
    with virtual_gpu("sm_90"), FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
        assert x[:, None, ::2].shape == (4, 1, 4)
        assert torch.tensor([1.5, 2.5], device=x.device).device == CUDA
