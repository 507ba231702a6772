"""A campaign: many random graphs, compared and counted, on a device that is here or for one that is not.

    PYTHONPATH=tests python -m fuzzing --graphs 200 --seed 1 --target cpu [--stock] [--csv campaign.csv]
    PYTHONPATH=tests python -m fuzzing --csv campaign.csv --sum

Targets: ``cpu`` and ``cuda`` run what they compile and compare bits; ``sm_80``, ``sm_90`` ... generate code for a GPU
that need not be there, through the verifier, and compare fingerprints over batch sizes. ``interpreter`` runs such
kernels in Triton's interpreter, for a few rows, and compares bits.

Each seed gives 48 graphs, and each bundle of them a line of the CSV, written when it is finished. The same command
again goes on with the first bundle that is not in it, and leaves out graphs that were drawn before.

``--workers``: that many processes, each with caches of its own; the CSV is written by this one alone. ``--minutes``: no
bundle is begun after this time. Those that run are finished; with several workers, only within a quarter of it more.
"""

from __future__ import annotations

import argparse
import sys

from .records import summary
from .workers import campaign


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzzing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--graphs",
        type=int,
        help="how many to run, in steps of a seed: 48, or without an end if --minutes is given",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--bundle", type=int, default=8, help="graphs per compile")
    parser.add_argument("--histories", type=int, default=1, help="compile histories drawn per bundle")
    parser.add_argument(
        "--pieces", type=int, default=4, help="batch sizes drawn per bundle; 2 if it scatters"
    )
    parser.add_argument("--contents", type=int, default=1, help="draws of the tensors per compile")
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--stock", action="store_true", help="count stock Inductor's violations beside ours")
    parser.add_argument("--shrink", type=int, default=1, help="how many violations to cut down to a snippet")
    parser.add_argument("--csv")
    parser.add_argument("--sum", action="store_true", help="add up the CSV and run nothing")
    arguments = parser.parse_args()
    if arguments.sum:
        print(summary(arguments.csv))
        return 0
    return campaign(arguments)


if __name__ == "__main__":
    sys.exit(main())
