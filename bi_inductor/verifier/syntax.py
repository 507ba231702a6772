"""Reading emitted Triton: one walk over a kernel's function, and the small questions the rules ask of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from .finding import Report
from .lengths import Names, Values, is_constant, values_of


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression made of names and attributes, or an empty string."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def is_power_of_two(values: Values | None) -> bool:
    """True for a constant 1, 2, 4, ..."""
    return values is not None and is_constant(values) and values[0] > 0 and values[0] & (values[0] - 1) == 0


def assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Names a statement binds, with the value where it binds one name to one expression."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Tuple):
                yield from ((dotted(element), statement.value) for element in target.elts)
            else:
                yield dotted(target), statement.value
    elif isinstance(statement, ast.AnnAssign):
        yield dotted(statement.target), statement.value
    elif isinstance(statement, (ast.AugAssign, ast.For)):
        yield dotted(statement.target), None


def carried(loop: ast.For) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a loop's body reads before it binds them, and the statement that then does."""
    bound: set[str] = {dotted(loop.target)}
    read: set[str] = set()
    for statement in loop.body:
        names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        targets = {name for name, _ in assigned(statement)}
        if isinstance(statement, ast.AugAssign):
            names |= targets
        read |= names - bound
        yield from ((name, statement) for name in sorted(targets & read))
        bound |= targets


class KernelSyntax:
    """One kernel definition: ``source`` is the string that ``async_compile.triton`` was given.

    Attributes: ``function`` (the last one of the module, or None), ``parameters``, ``statements`` (all of the
    body's, in order), ``assignments`` (name -> the last expression bound to it), ``loops`` (outermost), ``calls``
    and ``others`` (all other nodes of expressions).
    """

    def __init__(self, source: str, report: Report) -> None:
        self.report, self.lines = report, source.splitlines()
        self.module = ast.parse(source)
        functions = [node for node in self.module.body if isinstance(node, ast.FunctionDef)]
        self.function = functions[-1] if functions else None
        body = self.function.body if self.function else []
        self.parameters = [argument.arg for argument in self.function.args.args] if self.function else []
        self.statements = list(_statements(body))
        self.loops = [node for node in body if isinstance(node, ast.For)]
        self.assignments = {
            name: value
            for statement in self.statements
            for name, value in assigned(statement)
            if value is not None
        }
        self.calls: list[ast.Call] = []
        self.others: list[ast.AST] = []
        for node in _nodes(body):
            (self.calls if isinstance(node, ast.Call) else self.others).append(node)  # type: ignore[arg-type]

    def text(self, node: ast.AST | None) -> str:
        """The emitted text of a node, blanks as Python would write them if it stands on several lines."""
        if node is None:
            return ""
        if node.lineno == node.end_lineno:  # type: ignore[attr-defined]
            return self.lines[node.lineno - 1][node.col_offset : node.end_col_offset]  # type: ignore[attr-defined]
        return ast.unparse(node)

    def text_of(self, name: str) -> str:
        """The text of the expression bound to ``name``, or an empty string."""
        return self.text(self.assignments.get(name))

    def line(self, node: ast.AST) -> str:
        """The emitted line a node starts on."""
        return self.lines[node.lineno - 1].strip()  # type: ignore[attr-defined]

    def is_in_loop(self, statement: ast.stmt) -> bool:
        """True for a statement below one of the body's own."""
        return statement.col_offset > self.statements[0].col_offset

    def note(self, rule: str, node: ast.AST | None, found: str = "") -> None:
        """Report ``found`` (by default the whole line) at ``node``, or at the head of the function."""
        node = node or self.function
        self.report.add(rule, node.lineno if node else 1, found or self.line(node))  # type: ignore[attr-defined,arg-type]

    def set_constants(self, constants: Mapping[str, int]) -> None:
        """Read the kernel with other values of ``constants`` that it defines."""
        for name, value in constants.items():
            self.assignments[name] = ast.copy_location(ast.Constant(value), self.assignments[name])

    def values(self, name: str, arguments: Names) -> Values | None:
        """The values of a size of the kernel: set in its body, or passed by the wrapper."""
        value = self.assignments.get(name)
        return values_of(value, arguments) if value is not None else arguments.get(name)


#: Nothing to look into.
_LEAVES = (ast.Name, ast.Constant, ast.expr_context, ast.operator)


def _nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """All nodes below ``body``. As ast.walk, which takes most of its time for names and constants."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                waiting += [
                    child for child in value if isinstance(child, ast.AST) and not isinstance(child, _LEAVES)
                ]
            elif isinstance(value, ast.AST) and not isinstance(value, _LEAVES):
                waiting.append(value)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, name, []))
