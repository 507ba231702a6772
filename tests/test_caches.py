"""Compile caches: stock code is never served under our name, ours never under stock's, warm hits keep bits."""

import subprocess
import sys

import pytest
import torch
from devices import compiled, random_rows
from torch._dynamo.utils import counters

import bi_inductor
from bi_inductor import _compat, oracle, scope
from bi_inductor.options import Options
from bi_inductor.testing import same_bits


def total(x):
    return x.sum(-1)


def run(backend, x):
    torch._dynamo.reset()
    return torch.compile(total, backend=backend)(x)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("order", [("inductor", "batchinv"), ("batchinv", "inductor")])
def test_one_cache_directory_for_both(order, fresh_cache):
    x = random_rows(3, 5000)
    first = {backend: run(backend, x) for backend in order}
    counters.clear()
    again = {backend: run(backend, x) for backend in reversed(order)}
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert same_bits(first["batchinv"], oracle.tree_sum(x, -1))
    for backend in order:
        assert same_bits(first[backend], again[backend])
    assert not same_bits(first["inductor"], first["batchinv"]), "the example must tell the two apart"


def test_a_warm_hit_brings_its_certificate(fresh_cache):
    x = random_rows(3, 700)
    run("batchinv", x)
    before = bi_inductor.certificates()
    run("batchinv", x)
    after = bi_inductor.certificates()
    assert len(after) == len(before) + 1 and after[-1] == before[-1]


@pytest.mark.lengthy
def test_another_process_hits_the_same_cache(tmp_path):
    program = (
        "import torch; from torch._dynamo.utils import counters;"
        "x = torch.arange(5000.).sin().repeat(3, 1) * 1000;"
        "y = torch.compile(lambda x: x.sum(-1), backend='batchinv')(x);"
        "print(y.view(torch.int32).tolist(), counters['inductor']['fxgraph_cache_hit'],"
        " counters['aot_autograd']['autograd_cache_hit'])"
    )
    import os

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.rsplit(" ", 2)
        for _ in range(2)
    ]
    assert outputs[0][0] == outputs[1][0]
    assert [int(n) for n in outputs[0][1:]] == [0, 0]
    assert sum(int(n) for n in outputs[1][1:]) >= 1


def test_the_cache_tag_covers_sources_and_options(monkeypatch):
    tag = scope.cache_tag(Options())
    assert tag != scope.cache_tag(Options(unproven="warn"))
    monkeypatch.setattr(scope, "_sources", "something else")
    assert tag != scope.cache_tag(Options())


def test_without_the_tag_stock_code_would_be_served(fresh_cache, monkeypatch):
    """Negative control of the guard: with an empty tag, and no setting that differs from stock's by chance, our
    backend is handed stock's compiled sum."""
    x = random_rows(3, 5000)
    stock = run("inductor", x)
    monkeypatch.setattr(scope, "cache_tag", lambda options: "")
    monkeypatch.setattr(scope, "required_patches", dict)
    monkeypatch.setattr(_compat, "fusion_settings", dict)
    assert same_bits(run("batchinv", x), stock)


def test_the_same_function_compiled_twice_in_one_process():
    x = random_rows(5, 333)
    assert same_bits(compiled(lambda x: x.sum(-1))(x), run("batchinv", x))
