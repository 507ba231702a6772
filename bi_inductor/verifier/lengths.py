"""Lengths compared without a solver: every symbol gets fixed stand-in values, and equal lengths get equal values.

A length is written as a form (``s33*s50``), as Python in the wrapper (``(15 + s33*s50) // 16``) and as C++ in a
kernel (``static_cast<int64_t>(ks0*ks1)``). The stand-ins are products of small primes and one large factor of the
symbol's own, so what shape analysis may have simplified under a divisibility guard still agrees, and lengths that
differ by a symbol do not.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from ..certificate import Entry

#: What a length is under each set of stand-ins.
Values: TypeAlias = tuple[int, ...]
Names: TypeAlias = Mapping[str, Values | None]

_SETS = 2
_SMALL_PRIMES = 2**13 * 3**3 * 5**2 * 7 * 11
_SYMBOL = re.compile(r"[su]\d+")
_REDUCTION = re.compile(r"(Tree|Exact)\(\w+, ([^,]+), (.+)\)")
_CHAIN = re.compile(r"Chain\(([\w/]+), (.+)\)")
_CHUNKS = re.compile(r"(Scaled)?Chunks\(([\w/]+), (\d+), (.+)\)")
_ATTENTION = re.compile(r"Attention\(([\w/]+), (\d+), (\d+), (\d+), (\d+)\)")
_ATTENTION_GRADIENT = re.compile(r"AttentionGradient\(([\w/]+)\)")
#: Forms whose kernels reduce no axis: what they add is written out, element by element.
_WITHOUT_LENGTH = ("Drawn", "GroupChain", "Scan", "Segments")


def _exact_power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= 8:
        raise ValueError(exponent)
    return base**exponent


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _exact_power,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "max": max,
    "Min": min,
    "min": min,
}


def stand_ins(symbol: str) -> Values:
    """The values that stand for ``symbol``."""
    return tuple(_SMALL_PRIMES * (2 * (zlib.crc32(f"{symbol}.{i}".encode()) >> 8) + 1) for i in range(_SETS))


def constant(value: int) -> Values:
    return (value,) * _SETS


def is_constant(values: Values) -> bool:
    return len(set(values)) == 1


def ceil_div(length: Values, chunk: Values) -> Values:
    return tuple(-(-a // b) for a, b in zip(length, chunk, strict=True))


def product(lengths: Iterable[Values]) -> Values:
    return tuple(math.prod(column) for column in zip(constant(1), *lengths, strict=True))


def values_of(expression: ast.AST | str, names: Names | None = None) -> Values | None:
    """The values of an expression, or None if it cannot be read. Names are looked up first, then symbols."""
    try:
        tree = ast.parse(expression, mode="eval").body if isinstance(expression, str) else expression
        return tuple(_value(tree, names or {}, i) for i in range(_SETS))
    except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError):
        return None


def _value(node: ast.AST, names: Names, index: int) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return _name(node.id, names, index)
    if isinstance(node, ast.BinOp):
        apply = _OPERATORS[type(node.op)]
        return apply(_value(node.left, names, index), _value(node.right, names, index))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names, index)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _FUNCTIONS[node.func.id](*(_value(argument, names, index) for argument in node.args))
    raise ValueError(ast.dump(node))


def _name(name: str, names: Names, index: int) -> int:
    if name in names:
        values = names[name]
        if values is None:
            raise LookupError(name)
        return values[index]
    if _SYMBOL.fullmatch(name):
        return stand_ins(name)[index]
    raise LookupError(name)


def cpp_values_of(expression: str, names: Names) -> Values | None:
    """``values_of`` for an index expression in C++."""
    text = re.sub(r"\bstatic_cast<int64_t>|(?<=\d)L\b", "", expression)
    text = re.sub(r"\b(?:c10::)?div_floor_integer\b", "FloorDiv", text)
    return values_of(text.strip(), names)


class Forms:
    """Which lengths may be reduced, and how: the canonical forms of one kernel's ops, or of a whole graph.

    ``trees``: (combine, length) of ordered sums and products; ``unordered``: the same where no order matters;
    ``chains``: (accumulator, length) of matrix products; ``chunked``: (accumulator, length, chunk, is scaled).
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.trees: set[tuple[str, Values]] = set()
        self.unordered: set[tuple[str, Values]] = set()
        self.chains: set[tuple[str, Values]] = set()
        self.chunked: set[tuple[str, Values, int, bool]] = set()
        #: Accumulators of chains over the rows that a group turns out to have.
        self.group_chains: set[str] = set()
        #: Accumulator, tile, near chunk, near keys, far chunk.
        self.attentions: set[tuple[str, int, int, int, int]] = set()
        #: Accumulators.
        self.attention_gradients: set[str] = set()
        #: True if a form or its length could not be read: then no claim is made about lengths.
        self.is_open = False
        for form in {entry.form for entry in entries} - {""}:
            self._add(form)

    def _add(self, form: str) -> None:
        if attention := _ATTENTION.fullmatch(form):
            tile, near_chunk, near_keys, far_chunk = map(int, attention.groups()[1:])
            self.attentions.add((attention[1], tile, near_chunk, near_keys, far_chunk))
            return
        if gradient := _ATTENTION_GRADIENT.fullmatch(form):
            self.attention_gradients.add(gradient[1])
            return
        chain, reduction, chunked = (shape.fullmatch(form) for shape in (_CHAIN, _REDUCTION, _CHUNKS))
        found = (chain and chain[2]) or (reduction and reduction[3]) or (chunked and chunked[4])
        length = _form_length(found or "?")
        if form.startswith(_WITHOUT_LENGTH):
            if form.startswith("GroupChain("):
                self.group_chains.add(form.removeprefix("GroupChain(").removesuffix(")"))
            return
        if length is None:
            self.is_open = True
        elif chunked:
            self.chunked.add((chunked[2], length, int(chunked[3]), bool(chunked[1])))
        elif chain:
            self.chains.add((chain[1], length))
        elif reduction:
            (self.trees if reduction[1] == "Tree" else self.unordered).add((reduction[2], length))

    @property
    def are_any(self) -> bool:
        """True if there is a form that reduces something."""
        products = self.chains or self.chunked or self.group_chains
        attention = self.attentions or self.attention_gradients
        return bool(self.trees or self.unordered or products or attention or self.is_open)

    def lengths(self, combine: str) -> set[Values]:
        """Lengths that ``combine`` runs over."""
        return {length for kind, length in self.trees | self.unordered if kind == combine}


@functools.cache
def _form_length(expression: str) -> Values | None:
    return values_of(expression)
