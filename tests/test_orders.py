"""Orders of summation, revealed from outside: ours are the contract's at every batch, and stock's are not."""

import functools
import itertools
import json
import math
import operator
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import compiled, random_rows

from bi_inductor import contract, oracle, orders
from bi_inductor.cli import main
from bi_inductor.drawing import draw_svg
from bi_inductor.errors import OrderError
from bi_inductor.interpreter import run_in_interpreter
from bi_inductor.order_probe import Calls, Probe
from bi_inductor.orders import reveal_order
from bi_inductor.sum_tree import SumTree, chain, contract_tree, tree_of
from bi_inductor.testing import same_bits

PICTURE = Path(__file__).parent.parent / "docs" / "orders.svg"
LENGTHS = [1, 2, 3, 5, 8, 13, 33, 100]


def random_tree(generator, terms, widest=2):
    """A tree over ``terms`` in any order, with up to ``widest`` terms to a node."""
    open_ids, nodes = list(range(terms)), []
    while len(open_ids) > 1:
        width = min(len(open_ids), generator.randint(2, widest))
        children = tuple(open_ids.pop(generator.randrange(len(open_ids))) for _ in range(width))
        nodes.append(children)
        open_ids.append(terms + len(nodes) - 1)
    return SumTree(terms, tuple(nodes))


def fused(tree):
    """A sum in this order whose nodes align their terms with the largest and drop what is below 26 bits of it."""

    def add(values):
        largest = max(map(abs, values))
        if largest == 0:
            return 0.0
        last_place = 2.0 ** (math.frexp(largest)[1] - 26)
        return last_place * sum(math.trunc(value / last_place) for value in values)

    def fn(x):
        results = x.double().tolist()
        for children in tree.nodes:
            results.append(add([results[child] for child in children]))
        return torch.tensor(results[-1], dtype=torch.float32)

    return fn


# What a tree is.


def test_equal_orders_are_equal_values():
    tree = SumTree(4, ((2, 3), (1, 0), (5, 4)))
    assert tree == contract_tree(4) and hash(tree) == hash(contract_tree(4))
    assert tree != chain(4) and chain(3) == contract_tree(3)
    assert SumTree(2, ((0, 1),), accumulator="float32") == chain(2)  # where it was seen to hold is no order


@pytest.mark.parametrize(
    "nodes", [((0, 1),), ((0, 1), (3, 3)), ((0, 1), (0, 3)), ((0, 1), (3,)), ((0, 4), (1, 3)), ((0, 1, -1),)]
)
def test_what_is_no_tree_over_all_terms_is_refused(nodes):
    with pytest.raises(ValueError):
        SumTree(3, nodes)


@pytest.mark.parametrize("terms", LENGTHS)
def test_the_contracts_trees_add_up_to_the_oracles_bits(terms):
    x = random_rows(20, terms)
    assert same_bits(contract_tree(terms).add(x, torch.float32) + 0.0, oracle.tree_sum(x, -1))
    in_chain = x[:, 0]
    for k in range(1, terms):
        in_chain = in_chain + x[:, k]
    assert same_bits(chain(terms).add(x, torch.float32), in_chain)
    assert tree_of(contract.reduction_form("sum", terms, torch.bfloat16)) == contract_tree(terms)
    assert tree_of(contract.matmul_form(terms, torch.float64)) == chain(terms)


def test_a_form_without_an_order_has_no_tree():
    with pytest.raises(ValueError):
        tree_of(contract.reduction_form("max", 5, torch.float32))


def test_a_tree_of_fused_adders_does_not_say_how_to_round():
    with pytest.raises(ValueError):
        SumTree(3, ((0, 1, 2),)).add(torch.ones(3), torch.float32)


# That the probe finds it.


@pytest.mark.parametrize("terms", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_binary_tree_is_found(terms, dtype):
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    tree = random_tree(random.Random(terms), terms)
    found = reveal_order(lambda x: tree.add(x, accumulator).to(dtype), terms, dtype=dtype)
    assert found == tree


@pytest.mark.parametrize("seed", range(4))
def test_any_tree_of_fused_adders_is_found(seed):
    tree = random_tree(random.Random(seed), 19, widest=6)
    assert not tree.is_binary
    found = reveal_order(fused(tree), 19, dtype=[torch.float32, torch.float16][seed % 2])
    assert found == tree and found.accumulator is None


@pytest.mark.parametrize("probes_per_call", [1, 7, 64])
def test_many_probes_in_a_call_find_the_same(probes_per_call):
    tree = random_tree(random.Random(5), 30)
    found = reveal_order(lambda x: tree.add(x, torch.float32), 30, probes_per_call=probes_per_call)
    assert found == tree


@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64])
def test_the_accumulator_is_found(accumulator):
    found = reveal_order(lambda x: chain(9).add(x, accumulator).float(), 9)
    assert found == chain(9) and found.accumulator == str(accumulator).removeprefix("torch.")


@pytest.mark.lengthy
def test_a_mean_and_an_output_of_few_bits_are_no_obstacle():
    for terms in (100, 128):
        found = reveal_order(lambda x: (chain(x.numel()).add(x, torch.float32) / x.numel()).bfloat16(), terms)
        assert found == chain(terms)


def test_counts_stay_exact_where_every_addition_rounds():
    """6000 additions of a rounded 1/6000 drift by 0.3 of one; 1024 at a time by far less."""
    average = chain(6000)
    calls = Calls(lambda x: average.add(x / 6000, torch.float32), 6000, torch.float32, "cpu", 500)
    assert Probe(calls).survivors([(0, 1, torch.arange(6000))]) == [5998]


def test_a_function_may_overwrite_its_input():
    assert reveal_order(lambda x: chain(9).add(x.mul_(1), torch.float32) + x.zero_()[0], 9) == chain(9)


def test_a_chain_of_a_thousand_takes_few_calls():
    calls = 0

    def fn(x):
        nonlocal calls
        calls += 1
        return torch.tensor(functools.reduce(operator.add, x.tolist()))

    assert reveal_order(fn, 1000, replay=False) == chain(1000)
    assert calls < 4000


# That it says so if there is nothing to find.


def compensated(x):
    total = lost = torch.zeros(())
    for value in x:
        corrected = value - lost
        lost = ((following := total + corrected) - total) - corrected
        total = following
    return total


def by_the_largest(x):
    """A chain in one direction or the other, by where the largest value is."""
    forward = int(x.argmax()) < x.numel() // 2
    return chain(x.numel()).add(x if forward else x.flip(0), torch.float32)


def by_a_threshold(x):
    """A chain forwards; backwards if there are no huge values, as in all ordinary data."""
    return chain(x.numel()).add(x if x.abs().max() > 1e20 or (x == 0).any() else x.flip(0), torch.float32)


class Drifting:
    """A chain that turns round after some calls."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x):
        self.left -= 1
        return chain(x.numel()).add(x if self.left > 0 else x.flip(0), torch.float32)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        pytest.param(lambda x: x.sum() + 1, "fn(0) is 1", id="bias"),
        pytest.param(lambda x: x[1:].sum(), "x0 has the factor 0", id="left out"),
        pytest.param(lambda x: x.sum() + x[3], "x3 2; all need one and the same", id="twice"),
        pytest.param(lambda x: -x.sum(), "x0 has the factor -1", id="negative"),
        pytest.param(lambda x: torch.tensor(math.fsum(x.tolist())), "absorb nothing", id="exact"),
        pytest.param(lambda x: x.relu().sum(), "do not cancel", id="not linear"),
        pytest.param(by_the_largest, "units survive where the tree found", id="order by values"),
        pytest.param(compensated, "random values", id="compensated"),
        pytest.param(by_a_threshold, "random values", id="order by magnitude"),
        pytest.param(Drifting(1 + 12 + 6), "fit no tree", id="changing while it is found"),
        pytest.param(Drifting(1 + 12 + 40), "units survive where the tree found", id="changing later"),
    ],
)
def test_a_function_that_is_no_plain_sum_is_refused(fn, words):
    with pytest.raises(OrderError, match=re.escape(words)):
        reveal_order(fn, 12)


def test_what_a_wide_accumulator_keeps_of_fp16_is_refused():
    with pytest.raises(OrderError, match="wider accumulator"):
        reveal_order(lambda x: x.double().sum().half(), 12, dtype=torch.float16)


def test_the_range_of_fp16_ends():
    with pytest.raises(OrderError, match="range of"):
        reveal_order(lambda x: (x.float().sum() / 2**14).half(), 12, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "at least one term"),
        ({"n": 3, "dtype": torch.int32}, "cannot be probed"),
        ({"n": 3, "probes_per_call": 0}, "positive"),
        ({"n": 3, "fn": lambda x: x}, "must return 1 element"),
        ({"n": 3, "fn": lambda x: 1.0}, "must return 1 element"),
        ({"n": 3, "fn": lambda x: x.int().sum()}, "must return floats"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        reveal_order(**{"fn": torch.sum, **arguments})


# What is found in compiled kernels.


@pytest.mark.lengthy
def test_compiled_sums_are_the_contracts_tree_at_every_batch():
    total = compiled(lambda x: x.sum(-1), dynamic=True)
    for terms in LENGTHS:
        alone = reveal_order(orders.row_sum(total), terms)
        among_others = reveal_order(orders.row_sum(total, batch=64, row=63), terms)
        assert alone == among_others == contract_tree(terms)
    assert reveal_order(total, 1000, probes_per_call=64) == contract_tree(1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_compiled_sums_of_other_dtypes_are_the_contracts_tree(dtype):
    found = reveal_order(compiled(lambda x: x.sum(-1)), 37, dtype=dtype, probes_per_call=16)
    form = contract.reduction_form("sum", 37, dtype)
    assert found == tree_of(form) and found.accumulator == form.accumulator


@pytest.mark.lengthy
def test_compiled_column_sums_and_means_are_the_contracts_tree():
    columns = compiled(lambda x: x.sum(0))
    mean = compiled(lambda x: x.mean(-1))
    for batch in (1, 64):
        assert reveal_order(orders.column_sum(columns, batch=batch), 16) == contract_tree(16)
        assert reveal_order(orders.row_sum(mean, batch=batch), 13) == contract_tree(13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_products_are_the_contracts_chain_at_every_batch(dtype):
    """The accumulator that they start from, 0, cannot be seen: the first addition is x0 + x1."""
    matmul = compiled(torch.matmul, dynamic=True)
    for terms in (1, 2, 3, 5, 64):
        form = contract.matmul_form(terms, dtype)
        for rows in (1, 64):
            element = orders.matmul_element(matmul, rows=rows, columns=3, row=rows - 1, column=2)
            found = reveal_order(element, terms, dtype=dtype)
            assert found == tree_of(form)
            assert found.accumulator == form.accumulator or terms < 3  # two terms round alike in both


def test_a_compiled_product_of_a_thousand_terms_is_a_chain():
    b = torch.ones(1000, 1)
    rows = reveal_order(compiled(lambda a: a @ b), 1000, probes_per_call=64)
    assert rows == chain(1000)


@pytest.mark.lengthy
def test_a_compiled_attention_row_is_a_chain_at_every_batch():
    attention = compiled(F.scaled_dot_product_attention)
    for batch, queries in ((1, 1), (3, 5)):
        row = orders.attention_row(attention, batch=batch, queries=queries, row=batch - 1, query=queries - 1)
        assert reveal_order(row, 21) == chain(21)


@pytest.mark.parametrize(
    "make", [lambda fn: fn, lambda fn: torch.compile(fn, dynamic=False)], ids=["eager", "inductor"]
)
def test_stock_column_sums_change_with_the_batch(make):
    """What the tests above would see if our kernels did what stock's do."""
    columns = make(lambda x: x.sum(0))
    trees = {reveal_order(orders.column_sum(columns, batch=batch), 16) for batch in (1, 64)}
    assert len(trees) == 2


def test_emitted_triton_sums_are_the_contracts_tree():
    def total(x):
        return run_in_interpreter(lambda rows: rows.sum(-1), x)

    assert reveal_order(total, 13, probes_per_call=256) == contract_tree(13)


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [1, 2, 3, 5, 1000, 5000])
def test_triton_sums_are_the_contracts_tree(terms):
    total = compiled(lambda x: x.sum(-1))
    assert reveal_order(orders.row_sum(total), terms, device="cuda") == contract_tree(terms)
    assert reveal_order(total, terms, device="cuda", probes_per_call=64) == contract_tree(terms)


@pytest.mark.gpu
def test_triton_sums_of_many_lengths_are_the_contracts_tree():
    """Lengths from 1 to 5000: around powers of two, and others drawn once."""
    total = compiled(lambda x: x.sum(-1), dynamic=True)
    lengths = {2**k + d for k in range(2, 13) for d in (-1, 0, 1)}
    lengths |= set(random.Random(0).sample(range(1, 5001), 30))
    for terms in sorted(lengths):
        assert reveal_order(total, terms, device="cuda", probes_per_call=64) == contract_tree(terms), terms


def attention_tree(keys, form):
    """The form's order over ``keys`` equal scores: a chain for each chunk of keys, chunks added from left to right."""
    near = list(range(0, min(keys, form.near_keys), form.near_chunk))
    borders = [*near, *range(form.near_keys, keys, form.far_chunk), keys]
    nodes, total = [], None
    for low, high in itertools.pairwise(borders):
        last = low
        for key in range(low + 1, high):
            nodes.append((last, key))
            last = keys + len(nodes) - 1
        if total is not None:
            nodes.append((total, last))
            last = keys + len(nodes) - 1
        total = last
    return SumTree(keys, tuple(nodes))


def test_the_order_of_an_attention_row():
    form = contract.Attention("float32", 2, 2, 4, 3)
    assert attention_tree(9, form) == SumTree(
        9, ((0, 1), (2, 3), (9, 10), (4, 5), (12, 6), (11, 13), (7, 8), (14, 15))
    )
    assert attention_tree(2, form) == chain(2)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 5, 64, 300, 1500])
def test_triton_attention_rows_are_the_contracts_order(keys):
    """fp32 without tf32, so that a tile is a chain of FMAs; one query of a decode, and one among 70."""
    attention = compiled(F.scaled_dot_product_attention)
    expected = attention_tree(keys, contract.attention_form(16, 16, torch.float32))
    for queries, batch in ((1, 1), (1, 5), (70, 2)):
        row = orders.attention_row(attention, batch=batch, queries=queries, query=queries - 1)
        assert reveal_order(row, keys, device="cuda") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [1, 16, 33, 100, 255, 512])
def test_triton_products_are_the_contracts_chain(terms):
    matmul = compiled(torch.matmul)
    for rows in (1, 64):
        element = orders.matmul_element(matmul, rows=rows, columns=16)
        assert reveal_order(element, terms, device="cuda") == chain(terms)


@pytest.mark.gpu
@pytest.mark.parametrize("terms", [16, 100, 512])
def test_triton_products_on_tensor_cores_have_one_order(terms):
    """Steps of the hardware, several terms and the accumulator at once: one chain of nodes, at any number of rows."""
    matmul = compiled(torch.matmul)
    trees = {
        reveal_order(
            orders.matmul_element(matmul, rows=rows, columns=16), terms, dtype=torch.bfloat16, device="cuda"
        )
        for rows in (1, 64, 300)
    }
    (tree,) = trees
    assert all(sum(child >= tree.terms for child in children) <= 1 for children in tree.nodes)


# How it is drawn.


def test_a_small_tree_is_drawn_whole():
    assert (
        str(SumTree(5, ((0, 1), (2, 3, 4), (5, 6))))
        == """\
5 terms, depth 2, up to 3 terms at once
x0 ─┐
x1 ─┴─┐
x2 ─┐ │
x3 ─┤ │
x4 ─┴─┘"""
    )
    assert str(chain(1)) == "1 term\nx0"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("terms", [8, 32])
def test_a_drawing_tells_the_tree(terms, seed):
    tree = random_tree(random.Random(seed), terms, widest=4)
    assert tree_in(str(tree)) == tree


def tree_in(drawing):
    """Read a drawing back: a corner in a column joins what came from the left in the rows above it."""
    lines = drawing.splitlines()[1:]
    width = max(map(len, lines))
    lines = [line.ljust(width) for line in lines]
    result = [int(re.match(r"x(\d+)", line)[1]) for line in lines]
    nodes, children = [], []
    for column in range(len("x0"), width):
        for row, line in enumerate(lines):
            if line[column] == "┐":
                children = [result[row]]
            elif line[column] in "┤┴┘":
                children.append(result[row])
            if line[column] in "┴┘":
                nodes.append(tuple(children))
                result[row] = len(lines) + len(nodes) - 1
    return SumTree(len(lines), tuple(nodes))


def test_a_large_tree_is_abbreviated():
    assert str(contract_tree(1000)).splitlines()[1:] == ["pairs of x0, x1, x2, .., x999"]
    assert str(chain(1000)).splitlines()[1:] == ["chain x0, x1, x2, .., x999"]
    for seed in range(3):
        assert len(str(random_tree(random.Random(seed), 500)).splitlines()) <= 1 + 32


def followed_by(tree, count):
    """``tree`` and then ``count`` more terms, one after the other."""
    terms = tree.terms + count
    nodes = [tuple(k if k < tree.terms else k + count for k in children) for children in tree.nodes]
    for k in range(count):
        nodes.append((terms + len(nodes) - 1, tree.terms + k))
    return SumTree(terms, tuple(nodes))


def test_a_large_tree_of_chains_is_drawn_as_chains():
    even = [(0 if k == 2 else 98 + k // 2, k) for k in range(2, 100, 2)]
    odd = [(1 if k == 3 else 147 + k // 2, k) for k in range(3, 100, 2)]
    tree = SumTree(100, (*even, *odd, (148, 197)))
    assert str(tree).splitlines()[1:] == ["chain x0, x2, x4, .., x98 ─┐", "chain x1, x3, x5, .., x99 ─┘"]
    later = followed_by(contract_tree(37), 4)
    assert str(later).splitlines()[1:] == [
        "pairs of x0, x1, x2, .., x36 ─┐",
        "then x37, x38, x39, x40      ─┘",
    ]


def placed(svg):
    """(x, y, what) of every dot, wedge and text of a picture, checked to lie inside it, and its size."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    found = []

    def walk(element, dx, dy):
        moved = re.match(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
        if moved:
            dx, dy = dx + float(moved[1]), dy + float(moved[2])
        tag = element.tag.rpartition("}")[2]
        numbers = []
        if tag == "circle":
            numbers = [
                (
                    float(element.get("cx")),
                    float(element.get("cy")),
                    "dot" if element.get("r") == "4" else "result",
                )
            ]
        elif tag == "text":
            numbers = [(float(element.get("x")), float(element.get("y")), element.text)]
        elif tag == "path" and "l7 10" in element.get("d"):
            x, y = element.get("d")[1:].split("l")[0].split()
            numbers = [(float(x), float(y), "wedge")]
        elif tag == "path":
            for x, y, way, end in re.findall(r"M(\S+) ([\d.]+)([HV])([\d.]+)", element.get("d")):
                reached = (float(end), float(y)) if way == "H" else (float(x), float(end))
                assert 0 <= reached[0] + dx <= width and 0 <= reached[1] + dy <= height
        for x, y, what in numbers:
            assert 0 <= x + dx <= width and 0 <= y + dy <= height
            found.append((round(x + dx, 1), round(y + dy, 1), what))
        for child in element:
            walk(child, dx, dy)

    walk(root, 0.0, 0.0)
    return found


@pytest.mark.parametrize("terms", [1, 2, 16, 32, 1000])
def test_a_picture_lies_inside_its_frame_and_nothing_overlaps(terms):
    trees = [
        ("a < b", contract_tree(terms)),
        ("chain", chain(terms)),
        ("any", random_tree(random.Random(1), terms)),
    ]
    svg = draw_svg(trees)
    assert svg == draw_svg(trees)
    found = placed(svg)
    items = [(x, y, what) for x, y, what in found if what in ("dot", "wedge")]
    assert len(items) == 3 * terms if terms <= 32 else 3 <= len(items) <= 3 * 32
    for x, y, _ in items:
        assert not any(0 < abs(x - other) < 14 and abs(y - level) < 14 for other, level, _ in items)
    assert len({(x, y) for x, y, _ in items}) == len(items)
    assert sum(what == "a < b" for *_, what in found) == 1
    assert not re.search("href|script|url|style", svg)


def test_one_tree_draws_itself():
    assert chain(3).svg("three") == draw_svg([("three", chain(3))])


def test_the_picture_of_the_docs_shows_stock_change_and_ours_not():
    svg = PICTURE.read_text(encoding="utf-8")
    labels = [what for _, _, what in placed(svg)]
    assert [label for label in labels if label.startswith(("stock", "batchinv"))] == [
        "stock Inductor, batch 1", "stock Inductor, batch 64", "batchinv, batch 1", "batchinv, batch 64",
    ]  # fmt: skip
    numbers = [label for label in labels if label.isdigit()]
    tree, chained = [[str(k) for k in order] for order in (terms_as_drawn(contract_tree(16)), range(16))]
    assert numbers[32:] == tree + tree and numbers[16:32] == chained and numbers[:16] != tree


def terms_as_drawn(tree):
    return [int(re.match(r"x(\d+)", line)[1]) for line in str(tree).splitlines()[1:]]


# The command.


def test_the_command_shows_that_eager_changes(capsys, tmp_path):
    picture = tmp_path / "orders.svg"
    arguments = "orders column-sum --length 9 --backend eager --batch 1,64 --svg".split()
    assert main([*arguments, str(picture)]) == 1
    shown = capsys.readouterr().out
    assert "eager, batch 1" in shown and "eager, batch 64" in shown and "x8 ─" in shown
    assert "eager, batch 64" in [what for *_, what in placed(picture.read_text(encoding="utf-8"))]


def test_the_command_writes_json(capsys):
    assert main("orders sum --length 6 --backend batchinv --batch 1,5 --json".split()) == 0
    report = json.loads(capsys.readouterr().out)
    (order,) = report["orders"]
    assert order["batches"] == [1, 5] and order["contract"] == "Tree" and not report["changes_with_batch"]
    assert SumTree(order["terms"], tuple(map(tuple, order["nodes"]))) == contract_tree(6)


@pytest.mark.parametrize(
    "arguments",
    [
        "cumsum",
        "sum --backend magic",
        "sum --dtype int8",
        "sum --device tpu",
        "sum --length 0",
        "sum --batch 0",
        "sum --svg no/such/directory/a.svg",
    ],
)
def test_what_the_command_cannot_do_is_one_line(capsys, arguments):
    assert main(["orders", *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("batchinv: ") and errors.count("\n") == 1
