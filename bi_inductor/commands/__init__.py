"""The subcommands of ``python -m bi_inductor``, one module each, put together by ``cli.py``.

A module of a command defines

    SUMMARY                  one line for the list of commands
    EXAMPLE                  what ``--help`` ends with: at least one command line that works
    add_arguments(parser)    its arguments; ``--json`` is there already
    run(options) -> int      0: done; 1: the answer is "not batch-invariant"; raises CommandError for exit code 2

and imports what is heavy inside ``run``. What takes longer than two seconds says so with
``reporting.progress``.
"""

from __future__ import annotations

#: In the order in which ``--help`` lists them.
NAMES = ("inspect", "certify", "check", "orders", "doctor", "coverage", "versions")
