"""Which k one step of a matrix instruction adds, read from the layouts of Triton's GPU IR (TTGIR).

A ``tt.dot`` of TTIR says that k ascends over a tile. TTGIR also says which instruction computes it, and how many
neighbouring k a thread holds of an operand in registers (``kWidth``). If these fill 32 bits, a step of n products adds
n neighbouring k. If a thread holds more, the steps share them out: with 4 of bf16, the first of two steps with 16
products adds k 0, 1, 4, 5, 8, ..., 29, and the second 2, 3, 6, 7, ..., 31, which is another sum. Triton does so where
something narrower than the operand was loaded on the way to it.
"""

from __future__ import annotations

import dataclasses
import re

_LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d+), .*instrShape = \[([\d, ]+)\]", re.MULTILINE
)
_DOT = re.compile(r"= (tt\.dot|ttng\.warp_group_dot) .*? : (.*)$", re.MULTILINE)
_OPERAND = re.compile(
    r"tensor<\d+x\d+x(\w+), #ttg\.dot_op<\{opIdx = (\d), parent = (#\w+)(?:, kWidth = (\d+))?\}>>"
)
_MEMORY = re.compile(r"!ttg\.memdesc<\d+x\d+x(\w+),")
_RESULT = re.compile(r"-> tensor<[\dx]*x\w+, (#\w+)>")
_FAMILIES = {"2": "mma.sync", "3": "wgmma"}
#: Bits of neighbouring k that a thread holds of each row or column in one step of ``mma.sync`` and ``wgmma``.
_REGISTER = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """What computes a dot: "mma.sync", "wgmma" or "fma" (one product at a time), and how many k a step adds."""

    family: str
    depth: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """``found``: the steps of the dots of a kernel, in order. ``wrong``: dots whose steps do not add neighbouring k."""

    found: tuple[Step, ...]
    wrong: tuple[str, ...]


def steps_of(ttgir: str) -> Steps:
    """The steps of every dot that is computed with operands in registers or in shared memory, from TTGIR's text."""
    layouts = {name: (version, shape) for name, version, shape in _LAYOUT.findall(ttgir)}
    found, wrong = [], []
    for _, types in _DOT.findall(ttgir):
        operands, result = _OPERAND.findall(types), _RESULT.search(types)
        version, shape = layouts.get(result[1] if result else "", ("", ""))
        if not version:
            found.append(Step("fma", 1))
            continue
        family = _FAMILIES.get(version, f"mma version {version}")
        bits = _bits(operands[0][0] if operands else _MEMORY.findall(types)[0])
        found.append(Step(family, _depth(version, shape, bits)))
        wrong += [
            f"a dot by {family} whose threads hold {width} neighbouring k of {dtype}: no step adds neighbours alone"
            for dtype, _, _, width in operands
            if width and int(width) * _bits(dtype) != max(_REGISTER, _bits(dtype))
        ]
    return Steps(tuple(found), tuple(dict.fromkeys(wrong)))


def _bits(dtype: str) -> int:
    """Of an element: "bf16", "f8E4M3FN", "i8"."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None:
        raise ValueError(f"an operand of unknown type {dtype}")
    return int(found[1])


def _depth(version: str, shape: str, bits: int) -> int:
    """k of one step: ``wgmma`` names it in its shape [m, n, k]; an ``mma.sync`` step has 32 bytes of k, 4 of fp64."""
    if version == "3":
        return int(shape.split(",")[2])
    return 256 // bits
