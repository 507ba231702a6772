"""What every test runs under: fresh caches, one seed, two CPU threads, Hypothesis profiles, ``gpu`` with a GPU.

The caches are set before torch is imported. A run that shared a cache with an earlier one could be served
code that an older checkout generated; workers of pytest-xdist each import this file, so each has its own.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

_CACHE = tempfile.mkdtemp(prefix="batchinv-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_CACHE, "inductor")
os.environ["TRITON_CACHE_DIR"] = os.path.join(_CACHE, "triton")
# What the CPU says it has is taken for granted: each width that is tried out is a C++ compile in every process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Compiling takes seconds and varies with the machine's load, so no example has a deadline.
_COMPILING = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile(
    "ci", max_examples=15, derandomize=True, database=None, print_blob=True, **_COMPILING
)
settings.register_profile("dev", max_examples=60, print_blob=True, **_COMPILING)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_GPU_DESELECTED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Two threads even on one core: with one, a loop that is parallel where it must not be does not show.
    torch.set_num_threads(2)
    config.stash[_GPU_DESELECTED] = 0
    # Compiling makes many small objects, so Python looks for cycles often, each time in torch's modules too, which are
    # never dropped: they are left out, and it looks more rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if not torch.cuda.is_available():  # each worker has a core: no pool of processes that compile beside it
        torch._inductor.config.compile_threads = 1
    # Dynamo times each guard once more for its debug log, behind a flush of the CPU's caches.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = [item for item in items if item.get_closest_marker("gpu") is None]
    needing_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if needing_gpu:
        config.hook.pytest_deselected(items=needing_gpu)
    items[:] = without_gpu
    _record_deselected(config, len(needing_gpu))


def _record_deselected(config: pytest.Config, count: int) -> None:
    """Keep the count for the summary; a worker of pytest-xdist hands it to the process that prints."""
    config.stash[_GPU_DESELECTED] = count
    if hasattr(config, "workeroutput"):
        config.workeroutput["gpu_deselected"] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """The end of one xdist worker; each collects all tests, so the counts are equal, not to be added."""
    count = getattr(node, "workeroutput", {}).get("gpu_deselected", 0)
    stash = node.config.stash
    stash[_GPU_DESELECTED] = max(count, stash[_GPU_DESELECTED])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    count = config.stash[_GPU_DESELECTED]
    if count:
        terminalreporter.write_line(
            f"{count} tests marked gpu were deselected: this machine has no CUDA device"
        )


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Nobody reads what torch traces for its tools, unless TORCH_TRACE asks for it; with pytest's handler there, every
    graph is written out several times."""
    if "TORCH_TRACE" not in os.environ:
        torch._logging._internal.trace_log.handlers.clear()
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """No compiled code, guard or automatic-dynamic decision of one test reaches the next, and no random state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
