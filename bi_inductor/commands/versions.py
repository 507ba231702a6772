"""``python -m bi_inductor versions``: what results depend on besides the function and the device."""

from __future__ import annotations

import argparse
import json
import platform

from bi_inductor import __version__

SUMMARY = "Show the versions that results depend on."
EXAMPLE = "example:\n  python -m bi_inductor versions --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> int:
    """Print the versions."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    versions = {
        "batchinv": __version__,
        "torch": str(torch.__version__),
        "triton": triton_version,
        "python": platform.python_version(),
    }
    print(json.dumps(versions) if options.json else "\n".join(f"{k:10}{v}" for k, v in versions.items()))
    return 0
