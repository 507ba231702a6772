"""Prices by batch as an SVG: one dot per shape, and the geometric mean as a line."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 360, 56, 16, 36, 44
_LOWEST, _HIGHEST = 0.7, 1.5


def draw(points: Sequence[tuple[int, float]], title: str) -> str:
    """``points``: (M, price). M is on a logarithmic axis; a price beyond the frame stands at its edge."""
    by_rows: dict[int, list[float]] = collections.defaultdict(list)
    for m, price in points:
        by_rows[m].append(price)
    exponents = {m: math.log2(m) for m in by_rows}
    last = max(1.0, *exponents.values())

    def x(m: int) -> float:
        return _LEFT + exponents[m] / last * (_WIDTH - _LEFT - _RIGHT)

    def y(price: float) -> float:
        share = (min(max(price, _LOWEST), _HIGHEST) - _LOWEST) / (_HIGHEST - _LOWEST)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for tenth in range(round(_LOWEST * 10), round(_HIGHEST * 10) + 1):
        height, shade = y(tenth / 10), "#888" if tenth == 10 else "#ddd"
        parts.append(
            f'<line x1="{_LEFT}" y1="{height:.1f}" x2="{_WIDTH - _RIGHT}" y2="{height:.1f}" stroke="{shade}"/>'
        )
        parts.append(f'<text x="{_LEFT - 34}" y="{height + 4:.1f}">{tenth / 10:.1f}</text>')
    for m in sorted(by_rows):
        parts.append(f'<text x="{x(m):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{m}</text>')
        parts += [
            f'<circle cx="{x(m):.1f}" cy="{y(price):.1f}" r="2.5" fill="#36c" fill-opacity="0.45"/>'
            for price in by_rows[m]
        ]
    line = " ".join(f"{x(m):.1f},{y(statistics.geometric_mean(by_rows[m])):.1f}" for m in sorted(by_rows))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#c33" stroke-width="2"/>')
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">M (line: geometric mean)</text>'
    )
    return "\n".join([*parts, "</svg>", ""])
