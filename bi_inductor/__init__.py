"""batchinv: ``torch.compile(model, backend="batchinv")`` gives every row the same bits at every batch size."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BatchInvarianceError": "errors",
    "Certificate": "certificate",
    "Certification": "certification",
    "DeclarationError": "errors",
    "Inspection": "inspection",
    "MissingDependencyError": "errors",
    "OptionError": "errors",
    "OrderError": "errors",
    "SumTree": "sum_tree",
    "Variant": "variants",
    "assert_batch_invariant": "testing",
    "certificates": "certificate",
    "certify": "certification",
    "compare": "comparison",
    "compile_offline": "offline",
    "declarations": "declared_ops",
    "declare_invariant": "declared_ops",
    "inspect": "inspection",
    "reveal_order": "orders",
    "run_in_interpreter": "interpreter",
    "undeclare": "declared_ops",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
