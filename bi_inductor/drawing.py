"""Pictures of sum trees, as text and as SVG: people look rather than read.

A tree of up to 32 terms is drawn whole. In a larger one the subtrees that have a name (a chain, aligned pairs)
are drawn as one item, and of the rest as much as fits.
"""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Sequence
from html import escape

from .sum_tree import SumTree

_ITEMS = 32  # drawn at most: one row each as text, about half a screen's width as SVG

# SVG units. A leaf label of three digits at 10 units is 18 wide.
_LEAF_STEP, _LEVEL_STEP, _TREE_HEIGHT = 19.0, 22.0, 190.0
_MARGIN, _TITLE_HEIGHT, _LABEL_HEIGHT = 18.0, 52.0, 30.0
_GREY = "#7d8590"  # 4 : 1 on white and on GitHub's dark background alike


@dataclasses.dataclass(frozen=True)
class _Outline:
    """What is drawn: ``items`` from one side to the other, and for each drawn addition its drawn children."""

    items: list[int]
    additions: list[tuple[int, tuple[int, ...]]]
    labels: dict[int, str]
    sizes: dict[int, int]  # terms in an item

    def heights(self) -> dict[int, int]:
        """Levels above the items, for items and additions."""
        heights = dict.fromkeys(self.items, 0)
        for node, children in self.additions:
            heights[node] = 1 + max(heights[child] for child in children)
        return heights


def _outline(tree: SumTree) -> _Outline:
    sizes = dict(enumerate(tree.sizes()))
    abbreviated = tree.terms > _ITEMS
    labels = _named_subtrees(tree) if abbreviated else {}
    whole = set(labels)  # items that stay as they are
    shown, additions = [tree.root], {}
    while True:
        room = _ITEMS + 1 - len(shown)
        candidates = [k for k in shown if k not in whole and 0 < len(tree.children(k)) <= room]
        if not candidates:
            break
        node = max(candidates, key=lambda k: (sizes[k], -k))
        children = tree.children(node)
        rest, tail = _tail(tree, node) if abbreviated else (node, None)
        if tail:
            item = -1 - len(
                labels
            )  # no node of the tree: terms that are added to ``rest`` one after the other
            labels[item], sizes[item] = f"then {tail}", tail.count
            whole.add(item)
            children = (rest, item)
        position = shown.index(node)
        shown[position : position + 1] = children
        additions[node] = children
    labels = {k: labels.get(k) or _label(tree, k, sizes[k]) for k in shown}
    return _Outline(shown, sorted(additions.items()), labels, sizes)


def _tail(tree: SumTree, node: int) -> tuple[int, _Run | None]:
    """``node`` as a smaller subtree and the evenly spaced terms then added to it, if these are four or more."""
    terms: list[int] = []
    while len(tree.children(node)) == 2:
        term, rest = sorted(tree.children(node))  # a term's id is below every sum's
        if term >= tree.terms or rest < tree.terms:
            break
        if len(terms) > 1 and terms[-1] - term != terms[0] - terms[1]:
            break
        terms.append(term)
        node = rest
    return (node, _Run(terms[-1], terms[0] - terms[1], len(terms))) if len(terms) >= 4 else (node, None)


def _label(tree: SumTree, node: int, size: int) -> str:
    if node < tree.terms:
        return f"x{node}"
    lowest = node
    while tree.children(lowest):
        lowest = tree.children(lowest)[0]  # children are ordered by their lowest term
    return f"{size} terms from x{lowest} on, depth {tree.heights()[node]}"


@dataclasses.dataclass(frozen=True)
class _Run:
    """Terms ``start``, ``start + step``, ...: ``count`` of them, in the order they are added."""

    start: int
    step: int
    count: int

    def __str__(self) -> str:
        terms = [f"x{self.start + k * self.step}" for k in range(self.count)]
        return ", ".join(terms if self.count <= 4 else [*terms[:3], "..", terms[-1]])


def _named_subtrees(tree: SumTree) -> dict[int, str]:
    """The names of subtrees that are a chain or a tree of aligned pairs over evenly spaced terms."""
    chains: dict[int, _Run] = {k: _Run(k, 0, 1) for k in range(tree.terms)}
    pairs: dict[int, _Run] = dict(chains)
    names = {}
    for number, children in enumerate(tree.nodes):
        node = tree.terms + number
        if len(children) != 2:
            continue
        chain = _as_chain(tree, chains, *children) or _as_chain(tree, chains, *reversed(children))
        pair = _as_pairs(pairs, *children)
        if pair:
            pairs[node], names[node] = pair, f"pairs of {pair}"
        if chain:
            chains[node], names[node] = (
                chain,
                f"chain {chain}" if chain.count > 2 else str(chain).replace(", ", " + "),
            )
    return names


def _as_chain(tree: SumTree, chains: dict[int, _Run], longer: int, term: int) -> _Run | None:
    """``longer`` followed by ``term``, if that is a chain of evenly spaced terms in one direction."""
    run = chains.get(longer)
    if run is None or term >= tree.terms:
        return None
    if run.count == 1:
        return _Run(run.start, term - run.start, 2) if run.start < term else None
    turned = (
        _Run(run.start + run.step, -run.step, 2) if run.count == 2 else run
    )  # two terms have no direction
    for candidate in (run, turned):
        if term == candidate.start + candidate.count * candidate.step:
            return dataclasses.replace(candidate, count=candidate.count + 1)
    return None


def _as_pairs(pairs: dict[int, _Run], left: int, right: int) -> _Run | None:
    """``left`` beside ``right``, if that is the aligned tree of evenly spaced terms."""
    first, second = pairs.get(left), pairs.get(right)
    if first is None or second is None or first.count & (first.count - 1) or second.count > first.count:
        return None
    step = first.step or second.start - first.start
    aligned = second.start == first.start + first.count * step and second.step in (0, step)
    return _Run(first.start, step, first.count + second.count) if aligned else None


def _headline(tree: SumTree) -> str:
    if not tree.nodes:
        return "1 term"
    widest = max(len(children) for children in tree.nodes)
    at_once = "" if widest == 2 else f", up to {widest} terms at once"
    accumulator = f", added in {tree.accumulator}" if tree.accumulator else ""
    return f"{tree.terms} terms, depth {tree.depth}{at_once}{accumulator}"


def draw_text(tree: SumTree) -> str:
    """The tree lying on its side: terms on the left, one a row, and the result at the right."""
    outline = _outline(tree)
    heights = outline.heights()
    label_width = max(len(label) for label in outline.labels.values())
    row = {node: number for number, node in enumerate(outline.items)}
    canvas = [[" "] * (_column(heights[tree.root]) + 1) for _ in outline.items]
    for node, children in outline.additions:
        column, rows = _column(heights[node]), [row[child] for child in children]
        row[node] = rows[-1]
        for child in children:
            start = _column(heights[child]) + 1  # right of the corner the child ends in
            canvas[row[child]][start:column] = "─" * (column - start)
        for line in range(rows[0], rows[-1]):
            canvas[line][column] = "┐" if line == rows[0] else "┤" if line in rows else "│"
        canvas[rows[-1]][column] = "┘" if node == tree.root else "┴"
    lines = [
        f"{outline.labels[item]:{label_width}} {''.join(line).rstrip()}".rstrip()
        for item, line in zip(outline.items, canvas, strict=True)
    ]
    return "\n".join([_headline(tree), *lines])


def _column(height: int) -> int:
    return 2 * height - 1


def draw_svg(trees: Sequence[tuple[str, SumTree]], *, columns: int = 2) -> str:
    """Titled trees in a grid, as the text of one SVG picture: the same bytes for the same trees.

    Terms are at the bottom, coloured by their number, the result at the top. Nothing is fetched or scripted,
    and the colours are legible on a white and on a dark page.
    """
    panels = [_panel(title, tree) for title, tree in trees]
    columns = min(columns, len(panels))
    cell = max(panel.width for panel in panels)
    y, body = 0.0, []
    for start in range(0, len(panels), columns):
        beside = panels[start : start + columns]
        height = max(panel.height for panel in beside)
        for number, panel in enumerate(beside):
            body += [
                f'<g transform="translate({number * cell:g} {y:g})">',
                *panel.titles,
                f'<g transform="translate(0 {height - panel.height:g})">',
                *panel.drawing,
                "</g></g>",
            ]
        y += height
    size = f'viewBox="0 0 {columns * cell:g} {y:g}" width="{columns * cell:g}" height="{y:g}"'
    font = 'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="10"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>', *body, "</svg>", ""])


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One tree; the bottoms of ``drawing`` are aligned with those of its neighbours."""

    width: float
    height: float
    titles: list[str]
    drawing: list[str]


def _panel(title: str, tree: SumTree) -> _Panel:
    outline = _outline(tree)
    heights = outline.heights()
    level = min(_LEVEL_STEP, _TREE_HEIGHT / max(1, heights[tree.root]))
    bottom = _TITLE_HEIGHT + level * heights[tree.root]
    captions = {
        item: str(item) if 0 <= item < tree.terms else f"×{outline.sizes[item]}" for item in outline.items
    }
    step = max(_LEAF_STEP, 7.0 * max(map(len, captions.values())))
    x = {item: _MARGIN + step * (k + 0.5) for k, item in enumerate(outline.items)}
    y = {node: bottom - level * height for node, height in heights.items()}
    headline = _headline(tree)
    if len(outline.items) == 1 and tree.nodes:
        headline += f": {outline.labels[tree.root]}"
    titles = [
        f'<text x="{_MARGIN:g}" y="18" font-size="13" font-weight="600" fill="{_GREY}">{escape(title)}</text>',
        f'<text x="{_MARGIN:g}" y="33" fill="{_GREY}">{escape(headline)}</text>',
    ]
    drawing = []
    for node, children in outline.additions:
        ends = [x[child] for child in children]
        x[node] = (ends[0] + ends[-1]) / 2
        path = f"M{ends[0]:.4g} {y[node]:.4g}H{ends[-1]:.4g}"
        path += "".join(f"M{x[child]:.4g} {y[child]:.4g}V{y[node]:.4g}" for child in children)
        drawing.append(f'<path d="{path}" fill="none" stroke="{_GREY}" stroke-width="1.4"/>')
    if outline.additions:
        result = f'cx="{x[tree.root]:.4g}" cy="{y[tree.root]:.4g}"'
        drawing.append(f'<circle {result} r="3" fill="{_GREY}"/>')
    for item, caption in captions.items():
        hue = item / max(1, tree.terms - 1) if 0 <= item < tree.terms else None
        drawing.append(_item(outline.labels[item], caption, hue, x[item], y[item]))
    width = 2 * _MARGIN + max(step * len(outline.items), 7.5 * len(title), 5.5 * len(headline))
    return _Panel(width, bottom + _LABEL_HEIGHT, titles, drawing)


def _item(label: str, caption: str, hue: float | None, x: float, y: float) -> str:
    """A term as a dot, coloured from blue (0) through violet and red to orange (1); several terms as a wedge."""
    if hue is not None:
        colour = colorsys.hls_to_rgb((215 + 180 * hue) / 360 % 1, 0.56, 0.72)
        red, green, blue = (round(255 * part) for part in colour)
        shape = f'<circle cx="{x:.4g}" cy="{y:.4g}" r="4" fill="#{red:02x}{green:02x}{blue:02x}"/>'
    else:
        shape = f'<path d="M{x:.4g} {y - 4:.4g}l7 10h-14z" fill="{_GREY}"/>'
    text = f'<text x="{x:.4g}" y="{y + 17:.4g}" text-anchor="middle" fill="{_GREY}">{caption}</text>'
    return f"<g><title>{escape(label)}</title>{shape}{text}</g>"
