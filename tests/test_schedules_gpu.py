"""C2 on a GPU: any legal tile, warps, loop or split gives the same bits. This is the test that gives freedom."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from devices import compiled, random_rows
from torch._inductor import config

from bi_inductor import choices, verifier
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.lowerings import reductions
from bi_inductor.runtime import schedules
from bi_inductor.testing import same_bits

pytestmark = pytest.mark.gpu

CASES = {
    "inner": (lambda x: (x.sum(-1), x.var(-1)), (5, 5000)),
    "outer": (lambda x: (x.sum(0), (x * x).mean(0)), (5000, 70)),
    "norm": (lambda x: F.layer_norm(x, x.shape[-1:]), (33, 1000)),
    "softmax": (lambda x: x.softmax(-1), (3, 20000)),
    "prod": (lambda x: (1 + x / 1e5).prod(-1), (7, 3000)),
}
#: XBLOCK, R0_BLOCK, num_warps; at most 128 elements a thread, beyond which compiling takes minutes.
TILES = [
    (x, r, warps)
    for x, r, warps in itertools.product((1, 4, 32), (8, 64, 1024), (1, 4))
    if x * r <= 32 * 128 * warps
]


@pytest.fixture(autouse=True)
def in_process():
    """Forced schedules live in this process: no cache, no compile workers."""
    with config.patch(force_disable_caches=True, compile_threads=1):
        yield


@pytest.mark.parametrize("case", CASES)
def test_any_tile_gives_the_same_bits(case, monkeypatch):
    fn, shape = CASES[case]
    x = random_rows(*shape, device="cuda")
    expected = torch.utils._pytree.tree_leaves(compiled(fn)(x))
    used = set()
    monkeypatch.setattr(
        choices.BatchInvariantChoices, "should_use_persistent_reduction", staticmethod(lambda *_: False)
    )
    for tile in TILES:
        torch._dynamo.reset()

        def forced(rows, length, inner, tile=tile):
            used.add(tile)
            return tile

        monkeypatch.setattr(schedules, "looped_tile", forced)
        for a, b in zip(torch.utils._pytree.tree_leaves(compiled(fn)(x)), expected, strict=True):
            assert same_bits(a, b), tile
    assert used == set(TILES)


@pytest.mark.parametrize("case", ["inner", "softmax", "prod"])
@pytest.mark.parametrize("warps", [1, 2, 8, 16])
def test_any_number_of_warps_gives_the_same_bits(case, warps, monkeypatch):
    fn, shape = CASES[case]
    x = random_rows(*shape, device="cuda")
    expected = torch.utils._pytree.tree_leaves(compiled(fn)(x))
    stock = schedules.persistent_tile
    monkeypatch.setattr(schedules, "persistent_tile", lambda *arguments: (*stock(*arguments)[:2], warps))
    torch._dynamo.reset()
    for a, b in zip(torch.utils._pytree.tree_leaves(compiled(fn)(x)), expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [16, 256, 2048])
def test_any_split_gives_the_same_bits(case, chunk, monkeypatch):
    fn, shape = CASES[case]
    x = random_rows(*shape, device="cuda")
    expected = torch.utils._pytree.tree_leaves(compiled(fn)(x))
    split = []

    def forced(self, numel, hint):
        long = int(numel) >= 2 * chunk
        split.append(long)
        return chunk if long else None

    monkeypatch.setattr(reductions._Ordered, "_chunk", forced)
    torch._dynamo.reset()
    for a, b in zip(torch.utils._pytree.tree_leaves(compiled(fn)(x)), expected, strict=True):
        assert same_bits(a, b)
    assert any(split) == (max(shape) >= 2 * chunk if case == "outer" else shape[-1] >= 2 * chunk)


def test_a_split_off_the_subtree_borders_is_noticed(monkeypatch):
    """The guards have teeth: chunks that are no power of two are refused, and without the refusal change bits."""
    x = random_rows(5, 5000, device="cuda")
    expected = compiled(lambda x: x.sum(-1))(x)
    monkeypatch.setattr(reductions._Ordered, "_chunk", lambda self, numel, hint: 1000)
    monkeypatch.setattr(reductions._Ordered, "over", _split_once(reductions._Ordered.over))
    torch._dynamo.reset()
    with pytest.raises(BatchInvarianceError, match=r"rule 'block' .* a chunk of 1000 elements is"):
        compiled(lambda x: x.sum(-1))(x)
    monkeypatch.setattr("bi_inductor.verifier.check", verifier.examine)
    torch._dynamo.reset()
    assert not same_bits(compiled(lambda x: x.sum(-1))(x), expected)


def _split_once(stock):
    def over(self, inner_fn, numel, hint):
        if numel < 1000:
            return self._node(self.dst_dtype, inner_fn, self.ranges, numel, hint)
        return stock(self, inner_fn, numel, hint)

    return over


def test_a_stock_tile_search_gives_the_same_bits():
    x = random_rows(37, 3000, device="cuda")

    def fn(x):
        return F.layer_norm(x, x.shape[-1:]).softmax(-1)

    expected = compiled(fn)(x)
    torch._dynamo.reset()
    assert same_bits(compiled(fn, mode="max-autotune-no-cudagraphs")(x), expected)
