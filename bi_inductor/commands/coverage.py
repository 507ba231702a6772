"""``python -m bi_inductor coverage``: one verdict for each op of PyTorch's operator database."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bi_inductor.commands.reporting import CommandError, progress

if TYPE_CHECKING:
    from bi_inductor.coverage import OpResult, Settings

SUMMARY = (
    "Compile every op of PyTorch's operator database, compare all rows, and say which verdict each one gets."
)
EXAMPLE = """examples:
  python -m bi_inductor coverage --ops sum,nn.functional.conv2d
  python -m bi_inductor coverage --target sm_90 --markdown coverage.md
  python -m bi_inductor coverage --target interpreter --samples 1 --backward
  python -m bi_inductor coverage --resume coverage.jsonl --shard 1/4

Each sample of an op is compiled as it is, where its rows do not see each other, and for one sample lifted over a batch
by torch.func.vmap; all of them together, and where something is wrong with that each by itself.
Needs what torch's own tests need: pip install expecttest.
Exit code 1: some row changed its bits, or an op ended in an error."""

_FIELDS = ("op", "target", "verdict", "cases", "refused", "rows", "changed", "seconds", "reason", "stock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--ops", help="names, comma-separated (default: all with float32 support)")
    parser.add_argument(
        "--target",
        default="cpu",
        help="cpu or cuda: compare bits; interpreter: the same for a GPU's kernels, in Triton's interpreter; "
        "sm_90 ...: generate code (default: %(default)s)",
    )
    parser.add_argument("--lower-only", action="store_true", help="generate code for the CPU, run nothing")
    parser.add_argument("--backward", action="store_true", help="gradients of the inputs too")
    parser.add_argument("--dynamic", action="store_true", help="all sizes as symbols, not the batch alone")
    parser.add_argument("--samples", type=int, default=2, help="per op (default: %(default)s)")
    parser.add_argument("--backend", default="batchinv", help="batchinv or inductor (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds per op (default: %(default)s)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every Nth op, from the Ith (1 ... N)")
    parser.add_argument("--resume", metavar="FILE", help="JSON lines: read what is there, append the rest")
    parser.add_argument("--csv", metavar="FILE", help="write one line for each op")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")


def run(options: argparse.Namespace) -> int:
    """Judge the chosen ops; 1 if there is an error or a violation."""
    from bi_inductor.coverage import Settings
    from bi_inductor.coverage_pool import judged

    settings = Settings(
        options.target,
        options.backend,
        options.samples,
        options.backward,
        options.lower_only,
        options.dynamic,
    )
    _check(options, settings)
    names = _names(options)
    results = _read(options.resume)
    done = {result.op for result in results}
    wanted = [name for name in names if name not in done]
    for number, result in enumerate(judged(wanted, settings, options.limit), start=1):
        results.append(result)
        _append(options.resume, result)
        progress(f"{number} of {len(wanted)}: {result.op} is {result.verdict} ({result.seconds} s); going on")
    results = sorted((r for r in results if r.op in set(names)), key=lambda r: r.op)
    _write(options, results)
    return 1 if {"ERROR", "VIOLATION"} & {result.verdict for result in results} else 0


def _check(options: argparse.Namespace, settings: Settings) -> None:
    import torch

    from bi_inductor.targets import find_target
    from bi_inductor.virtual import require_triton

    if options.backend not in ("batchinv", "inductor"):
        raise CommandError(f"--backend takes batchinv or inductor, not {options.backend!r}")
    if options.target == "cuda" and not torch.cuda.is_available():
        raise CommandError("--target cuda needs a CUDA device; --target sm_90 generates code without one")
    if options.target == "interpreter":
        require_triton()
    elif options.target not in ("cpu", "cuda"):
        find_target(options.target)
    if options.backend == "inductor" and not (settings.runs and options.target in ("cpu", "cuda")):
        raise CommandError("--backend inductor compares bits: it takes --target cpu or cuda")


def _names(options: argparse.Namespace) -> list[str]:
    """The ops of this run, in the order of the database."""
    from bi_inductor.coverage_cases import entries

    known = list(entries())
    names = options.ops.split(",") if options.ops else known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CommandError(f"the operator database has no float32 entry {', '.join(unknown)}")
    try:
        shard, shards = map(int, options.shard.split("/"))
    except ValueError:
        shard, shards = 0, 0
    if not 1 <= shard <= shards:
        raise CommandError(f"--shard takes I/N with 1 <= I <= N, not {options.shard!r}")
    return names[shard - 1 :: shards]


def _read(path: str | None) -> list[OpResult]:
    from bi_inductor.coverage import OpResult

    if path is None or not Path(path).is_file():
        return []
    lines = Path(path).read_text().splitlines()
    try:
        return list(
            {found.op: found for found in (OpResult.from_json(json.loads(line)) for line in lines)}.values()
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} was not written by this command") from error


def _append(path: str | None, result: OpResult) -> None:
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def _write(options: argparse.Namespace, results: list[OpResult]) -> None:
    totals = _totals(results)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, _FIELDS)
            writer.writeheader()
            writer.writerows(map(_row, results))
    if options.markdown:
        Path(options.markdown).write_text(_markdown(results, totals))
    if options.json:
        print(json.dumps({**totals, "ops": [dataclasses.asdict(result) for result in results]}))
        return
    for result in results:
        row = _row(result)
        print(f"{row['op']:44} {row['verdict']:10} {row['rows']:>6} rows  {row['reason'][:120]}".rstrip())
    print(", ".join(f"{count} {name}" for name, count in totals.items() if not isinstance(count, dict)))


def _totals(results: list[OpResult]) -> dict[str, Any]:
    found = Counter(result.verdict for result in results)
    far = [r.op for r in results if not all(case.near_eager for case in r.cases)]
    return {
        "ops": len(results),
        **dict(sorted(found.items())),
        "rows compared": sum(result.rows for result in results),
        "rows changed": sum(case.changed for result in results for case in result.cases),
        "far from eager": len(far),
        "refused but lowered by stock without a fallback": sum(r.is_lowered_by_stock for r in results),
    }


def _row(result: OpResult) -> dict[str, Any]:
    return {
        "op": result.op,
        "target": result.target,
        "verdict": result.verdict,
        "cases": sum(result.counts.values()),
        "refused": result.counts.get("refused", 0),
        "rows": result.rows,
        "changed": sum(case.changed for case in result.cases),
        "seconds": result.seconds,
        "reason": result.reason,
        "stock": "; ".join(dict.fromkeys(case.stock for case in result.cases if case.stock)),
    }


def _markdown(results: list[OpResult], totals: dict[str, Any]) -> str:
    """The table with the command and the versions that made it."""
    import torch

    from bi_inductor import __version__

    summary = ", ".join(f"{count} {name}" for name, count in totals.items())
    lines = [
        "# Coverage of PyTorch's operators",
        "",
        f"`batchinv {' '.join(sys.argv[1:])}`; batchinv {__version__}, torch {torch.__version__}.",
        "",
        f"{summary}.",
        "",
        "| op | verdict | cases | rows compared | reason |",
        "|---|---|---|---|---|",
    ]
    for row in map(_row, results):
        reason = row["reason"].replace("|", "\\|")[:160]
        lines.append(f"| {row['op']} | {row['verdict']} | {row['cases']} | {row['rows']} | {reason} |")
    return "\n".join([*lines, "", *_exceptions(results), ""])


def _exceptions(results: list[OpResult]) -> list[str]:
    """What is refused, and which kernels of ATen stock Inductor calls for it."""
    refused = [result for result in results if result.verdict == "refused"]
    lines = [
        "## Refused here, and in stock",
        "",
        "Kernels of ATen that stock Inductor's code calls for each op;",
    ]
    lines += [
        "*none*: stock lowers all of it, so a canonical form is owed.",
        "",
        "| op | stock calls |",
        "|---|---|",
    ]
    for result in refused:
        found = dict.fromkeys(case.stock for case in result.cases if case.stock)
        lines.append(f"| {result.op} | {'; '.join(found) or 'not looked at'} |")
    return lines
