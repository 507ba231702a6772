"""Bodies of higher-order ops are ruled on, lowered and listed like the graph around them."""

import pytest
import torch
from devices import DEVICES, compiled, random_rows
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import bi_inductor
from bi_inductor import BatchInvarianceError


@torch.compiler.nested_compile_region
def region(x):
    return x.softmax(-1) * x.sum(-1, keepdim=True)


def repeated(x):
    return while_loop(
        lambda i, y: i < 3,
        lambda i, y: (i + 1, y * y.softmax(-1).sum(-1, keepdim=True)),
        (
            torch.zeros((), dtype=torch.int64, device=x.device),
            x.clone(),
        ),
    )[1]


BODIES = {
    "cond": lambda x: torch.cond(x.shape[-1] > 0, lambda x: x.softmax(-1), lambda x: x.cumsum(-1), (x,)),
    "cond of data": lambda x: torch.cond(
        (x != x).any(), lambda x: x.cumsum(-1), lambda x: x.softmax(-1).cumsum(-1), (x,)
    ),
    "while_loop": repeated,
    "a region compiled once": lambda x: region(region(x) + 1),
    "scan": lambda x: scan(lambda c, e: (c + e, c.softmax(-1)), torch.zeros_like(x[:, 0]), x, dim=1)[0],
    "associative_scan": lambda x: associative_scan(lambda a, b: a + b, x, 1, combine_mode="generic"),
    "checkpoint": lambda x: checkpoint(lambda x: x.softmax(-1), x, use_reentrant=False),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_see_the_batch(device, name):
    x = random_rows(7, 6 if "scan" in name else 40, device=device)
    call = compiled(BODIES[name], fullgraph=True)
    bi_inductor.assert_batch_invariant(call, x, batches=(1, 7))
    torch.testing.assert_close(call(x), BODIES[name](x), rtol=1e-4, atol=1e-3)


def test_the_ops_of_a_body_are_in_the_certificate():
    x = random_rows(3, 9)
    compiled(BODIES["cond of data"])(x)
    entries = bi_inductor.certificates()[-1].entries
    assert len({entry.name for entry in entries}) == len(entries)
    assert any(entry.form.startswith("Tree(float32, sum, 9") for entry in entries)
    assert any(entry.form.startswith("Scan(") for entry in entries)


def test_a_body_without_a_canonical_form_is_refused_by_its_line():
    def branches(x):
        return torch.cond((x > 0).all(), lambda x: torch.linalg.svdvals(x), lambda x: x.sum(-1), (x,))

    with pytest.raises(BatchInvarianceError, match=r"_linalg_svd[\s\S]*test_bodies\.py"):
        compiled(branches)(random_rows(3, 3))


def test_a_scan_by_tiles_is_refused_with_the_remedy():
    x = random_rows(3, 9)
    with pytest.raises(BatchInvarianceError, match='combine_mode="generic"'):
        bi_inductor.inspect(lambda x: associative_scan(lambda a, b: a + b, x, 1), x, target="sm_90")
