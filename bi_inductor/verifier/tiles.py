"""Chain kernels as one straight line of statements: what a tile's constants leave of ``if``, and no loop over tiles.

The loop over tiles gives every program all of the tiles with its number modulo the number of programs. If nothing is
carried from one tile to the next, what it computes for a tile is its body, and the rules for products read that.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any

from .finding import Report
from .syntax import carried

TILE_LOOP = "for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):"


@dataclasses.dataclass(frozen=True)
class Straight:
    """A kernel without branches; ``lines[i]`` is the line of the emitted kernel behind line i + 1 of ``text``.

    ``others``: sizes of further tiles with the same statements.
    """

    text: str
    lines: tuple[int, ...]
    others: tuple[dict[str, int], ...] = ()


class MappedReport(Report):
    """Findings in a ``Straight`` kernel, reported where they stand in the emitted one, each once."""

    def __init__(self, report: Report, straight: Straight) -> None:
        super().__init__(report.kernel, report.first_line)
        self._report, self._lines = report, straight.lines

    def add(self, rule: str, line: int, found: str) -> None:
        """As ``Report.add``."""
        known = len(self._report.findings)
        self._report.add(rule, self._lines[line - 1], found)
        if self._report.findings[-1] in self._report.findings[:known]:
            self._report.findings.pop()


def straightened(source: str, report: Report) -> Iterator[Straight]:
    """``source`` as each of its tiles runs it; nothing for a kernel that is no chain over tiles."""
    if TILE_LOOP not in source:
        return
    module = ast.parse(source)
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    alike: dict[tuple[tuple[str, bool], ...], list[dict[str, Any]]] = {}
    for tile in _tiles(functions[-1]):
        branches = {
            name: bool(value) for name, value in tile.items() if name == "EXTRA_N" or value in (True, False)
        }
        alike.setdefault(tuple(branches.items()), []).append(tile)
    for tile, *others in alike.values():
        sizes = [
            {name: n for name, n in other.items() if name.startswith(("BLOCK", "EXTRA"))} for other in others
        ]
        straight = _Straightening(source, functions[-1], tile, report).result()
        yield dataclasses.replace(straight, others=tuple(sizes))


def _tiles(function: ast.FunctionDef) -> list[dict[str, Any]]:
    """Constants of each tile that the decorator names; of the only one, if the body defines them."""
    for decorator in function.decorator_list:
        for keyword in getattr(decorator, "keywords", []):
            if keyword.arg == "triton_meta" and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "tiles":
                        return ast.literal_eval(value)
    return [{}]


class _Straightening:
    def __init__(self, source: str, function: ast.FunctionDef, tile: dict[str, Any], report: Report) -> None:
        self._source, self._report = source.splitlines(), report
        self._constants = {name: value for name, value in tile.items() if name.isupper()}
        defined = {name: repr(value) for name, value in self._constants.items()}
        self._constants |= dict(_defined(function.body))
        first = function.body[0].lineno
        self._emitted = [(line, number + 1) for number, line in enumerate(self._source[: first - 1])]
        self._emitted += [
            (f"    {name} : tl.constexpr = {value}", function.lineno) for name, value in defined.items()
        ]
        self._flatten(function.body, 4)

    def result(self) -> Straight:
        text, lines = zip(*self._emitted, strict=True)
        return Straight("\n".join(text), lines)

    def _flatten(self, statements: list[ast.stmt], indent: int) -> None:
        for statement in statements:
            if isinstance(statement, ast.If) and (known := self._is_taken(statement.test)) is not None:
                self._flatten(statement.body if known else statement.orelse, indent)
            elif isinstance(statement, ast.For):
                self._flatten_loop(statement, indent)
            else:
                self._copy(statement, statement.end_lineno or statement.lineno, indent)

    def _flatten_loop(self, loop: ast.For, indent: int) -> None:
        if self._source[loop.lineno - 1].strip() == TILE_LOOP and indent == 4 and not loop.orelse:
            self._emitted.append((" " * indent + "number = tl.program_id(0)", loop.lineno))
            start = len(self._emitted)
            self._flatten(loop.body, indent)
            self._check_alone([line for line, _ in self._emitted[start:]], loop.lineno)
        else:
            self._copy(loop, loop.body[0].lineno - 1, indent)
            self._flatten(loop.body, indent + 4)

    def _check_alone(self, body: list[str], line: int) -> None:
        """No name is read in ``body`` before ``body`` binds it and then bound: one tile knows nothing of another."""
        (loop,) = ast.parse("\n".join(["for number in tiles:", *body])).body
        assert isinstance(loop, ast.For)
        for number, statement in reversed(list(enumerate(loop.body))):
            if isinstance(statement, ast.For):
                start = ast.Assign(targets=[statement.target], value=ast.Constant(0))
                loop.body[number : number + 1] = [start, *statement.body]
        for name, _ in carried(loop):
            self._report.add("accumulation", line, f"{name} is carried from one tile to the next")

    def _copy(self, statement: ast.stmt, last: int, indent: int) -> None:
        shift = indent - statement.col_offset
        for number in range(statement.lineno, last + 1):
            line = self._source[number - 1]
            self._emitted.append((" " * shift + line if shift > 0 else line[-shift:], number))

    def _is_taken(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            known = self._is_taken(test.operand)
            return None if known is None else not known
        return (
            bool(self._constants[test.id])
            if isinstance(test, ast.Name) and test.id in self._constants
            else None
        )


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Constants that a kernel defines in its body."""
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            yield ast.unparse(statement.target), statement.value.value
