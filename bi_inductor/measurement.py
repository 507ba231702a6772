"""What ``doctor --json`` measured on a GPU, and the kernels of a certificate whose tiles or schedules are among that.

A product of a generated kernel counts as measured if every tile that the kernel may run with was run by the doctor
for its kind of operands, all tiles of that kind gave one class of bits for every K, and GPU and versions are those of
the certificate. The doctor's K are its own: what it shows is that tiles do not differ, not how long a sum is. Attention
counts as measured if its schedule was run, for its form, dtype, head dim, scale and kind of mask.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .certificate import Certificate, Entry, Environment, Level
from .inspection import kernel_definitions
from .measurement_attention import AttentionRun, measured_runs, operand_types, run_of

#: Of the JSON object that ``doctor --json`` prints; it changes when a field changes its meaning.
DOCTOR_SCHEMA = 1

_TILE = ("BLOCK_M", "BLOCK_N", "EXTRA_N", "BLOCK_K", "GROUP_M", "SWAP", "TMA", "num_warps", "num_stages")
#: Of a kernel that has no such constant.
_DEFAULTS = {"EXTRA_N": 0, "GROUP_M": 8, "SWAP": False, "TMA": False}
#: Form's kind and accumulator, type of the operands in the kernel's signature -> kinds of the doctor.
_KINDS = {
    ("Chain", "float32", "bf16"): ("bfloat16", "bfloat16-unaligned"),
    ("Chain", "float32", "fp16"): ("float16",),
    ("Chain", "float32", "fp32"): ("float32",),
    ("Chain", "tf32/float32", "fp32"): ("tf32",),
    ("Chain", "float64", "fp64"): ("float64",),
    ("Chunks", "fp8", "fp8e4nv"): ("float8_e4m3fn",),
    ("Chunks", "fp8", "fp8e5"): ("float8_e5m2",),
    ("Chain", "fp8", "fp8e4nv"): ("float8_e4m3fn-fast",),
}
_DRIVER = Path("/proc/driver/nvidia/version")
Tile = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MeasuredOn:
    """Where a measurement was made. ``unused``: why it says nothing about the certificates; empty if it does."""

    gpu: str
    driver: str
    batchinv: str
    torch: str
    triton: str
    unused: str = ""

    def __str__(self) -> str:
        versions = f"batchinv {self.batchinv}, torch {self.torch}, triton {self.triton}"
        where = f"{self.gpu}, driver {self.driver}, {versions}"
        return f"measured on {where}" + (f": NOT USED, since {self.unused}" if self.unused else "")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A doctor's result. ``tiles``: kind -> those that were run, as ``Tile.key``; ``split``: kinds with several classes
    of bits; ``attention``: its kernels that were run, where all had the same bits."""

    on: MeasuredOn
    tiles: dict[str, frozenset[Tile]]
    split: frozenset[str]
    attention: frozenset[AttentionRun] = frozenset()

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """What ``doctor --json`` printed. Raises ValueError for any other text."""
        try:
            fields = json.loads(text)
            if fields["schema"] != DOCTOR_SCHEMA:
                raise ValueError(f"schema {fields['schema']} is another version's; run doctor again")
            results = [result for result in fields["results"] if "runs" not in result]
            attention = measured_runs(result for result in fields["results"] if "runs" in result)
            tiles: dict[str, frozenset[Tile]] = {}
            for result in results:
                known = tiles.get(result["kind"], frozenset())
                tiles[result["kind"]] = known | {tuple(map(int, tile)) for tile in result["shapes"]}
            split = frozenset(result["kind"] for result in results if set(result["classes"]) != {1})
            on = MeasuredOn(*(fields[name] for name in ("gpu", "driver", "batchinv", "torch", "triton")))
            return cls(on, tiles, split, attention)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no result of doctor --json: {error!r}") from error

    def about(self, environment: Environment) -> MeasuredOn:
        """Where it was made, and whether that speaks about code for ``environment``."""
        return dataclasses.replace(self.on, unused=self.difference(environment))

    def difference(self, environment: Environment) -> str:
        """What keeps it from speaking about code for ``environment``; empty if nothing does.

        The driver is compared where there is one: code is generated on machines without a GPU, too.
        """
        versions = dict(environment.versions)
        here = {"gpu": environment.device}
        here |= {name: versions.get(name, "none") for name in ("batchinv", "torch", "triton")}
        if driver_version():
            here["driver"] = driver_version()
        return ", ".join(
            f"{name} {getattr(self.on, name)} against {value}"
            for name, value in here.items()
            if getattr(self.on, name) != value
        )

    def covers(self, entry: Entry, kernels: Sequence[str]) -> bool:
        """True if what ``entry`` may run with, in kernels of these sources, was measured and did not differ."""
        if entry.form.startswith("Attention("):
            return run_of(kernels, entry.form) in self.attention
        return any(self._covers_product(entry, kernel) for kernel in kernels)

    def _covers_product(self, entry: Entry, kernel: str) -> bool:
        kinds = [kind for kind in _kinds_of(entry, kernel) if kind in self.tiles]
        if not kinds or self.split.intersection(kinds):
            return False
        known = frozenset().union(*(self.tiles[kind] for kind in kinds))
        tiles = tiles_of(kernel)
        return bool(tiles) and known.issuperset(tiles)


def driver_version() -> str:
    """Of this machine's NVIDIA driver, as its kernel module says; empty where there is none."""
    if not _DRIVER.exists():
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER.read_text())
    return found[1] if found else ""


def with_measurement(made: Certificate, source: str, measurement: Measurement) -> Certificate:
    """``made`` with the level of what was measured. What the verifier did not follow stays where it is."""
    if measurement.difference(made.environment):
        return made
    texts = kernel_definitions(source)
    checked = {Level.SOURCE.value, Level.IR.value}

    def sources(entry: Entry) -> list[str]:
        return [texts[k.name] for k in made.kernels if entry.name in k.ops and k.name in texts]

    measured = {
        entry.name
        for entry in made.entries
        if entry.level in checked and measurement.covers(entry, sources(entry))
    }

    def raised(claim: Any, names: set[str]) -> Any:
        return dataclasses.replace(claim, level=Level.MEASURED.value) if names & measured else claim

    return dataclasses.replace(
        made,
        entries=tuple(raised(entry, {entry.name}) for entry in made.entries),
        kernels=tuple(raised(kernel, set(kernel.ops)) for kernel in made.kernels),
    )


def _kinds_of(entry: Entry, kernel: str) -> tuple[str, ...]:
    form = re.match(r"(\w+)\(([\w/]+)", entry.form)
    types = operand_types(kernel)
    if form is None or "A" not in types:
        return ()
    if "ENDS" in types:  # where the groups of a grouped product end
        return ("bfloat16-grouped",) if types["A"] == "bf16" else ()
    accumulator = "fp8" if form[2].startswith("fp8_") else form[2]
    return _KINDS.get((form[1], accumulator, types["A"]), ())


def tiles_of(kernel: str) -> set[Tile]:
    """Every tile that an emitted matrix product may run with, as ``Tile.key``; empty if the source does not say."""
    several = re.search(r"'tiles': (\[.*?\])", kernel)
    if several is not None:
        return {_key(tile) for tile in ast.literal_eval(several[1])}
    found = dict(re.findall(r"^ +(\w+) ?: tl\.constexpr = (\w+)$", kernel, re.MULTILINE))
    found |= dict(re.findall(r"^(num_\w+)=(\d+)", kernel, re.MULTILINE))
    values = {name: ast.literal_eval(found[name]) for name in _TILE if name in found}
    required = [name for name in _TILE if name not in _DEFAULTS]
    return {_key(values)} if all(name in values for name in required) else set()


def _key(tile: dict[str, Any]) -> Tile:
    return tuple(int(tile.get(name, _DEFAULTS.get(name))) for name in _TILE)  # type: ignore[arg-type]
