"""``torch.compile(mode=..., options=...)``: what a user may say, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from . import _compat
from .errors import OptionError

_PREFIX = "batchinv."
_MODES = {
    None: {},
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune": {
        "max_autotune": True,
        "triton.cudagraphs": True,
        "coordinate_descent_tuning": True,
    },
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Our own options, given as ``options={"batchinv.<field>": value}``.

    unproven: "refuse" (default) raises BatchInvarianceError for an op without a canonical form;
              "warn" compiles the stock lowering of it, warns once and marks it UNPROVEN in the certificate.
    continue_gradients: True lets the gradients of fp32 parameters go on from ``parameter.grad``, so that
              micro-batches add up to the bits of the whole batch (docs/training.md).
    """

    unproven: str = "refuse"
    continue_gradients: bool = False

    def __post_init__(self) -> None:
        if self.unproven not in ("refuse", "warn"):
            raise OptionError(f"batchinv.unproven must be 'refuse' or 'warn', not {self.unproven!r}")
        if not isinstance(self.continue_gradients, bool):
            raise OptionError(
                f"batchinv.continue_gradients must be True or False, not {self.continue_gradients!r}"
            )


#: Inductor settings the contract needs, each with its reason. A user's option that says otherwise is refused.
REQUIRED_SETTINGS: dict[str, tuple[Any, str]] = {
    "pattern_matcher": (False, "its rewrites follow sizes, strides and how many users a node has"),
    "joint_graph_constant_folding": (
        False,
        "it takes x * 0 for 0 and x + 0 for x where it sees a constant, which dynamic shapes hide",
    ),
    "shape_padding": (False, "it pads matmuls when a benchmark says so"),
    "decompose_mem_bound_mm": (False, "it replaces matmuls by sums when M is large enough"),
    "emulate_precision_casts": (True, "rounding must not depend on what is fused"),
    "eager_numerics.division_rounding": (
        True,
        "an approximate quotient follows whether its divisor is a constant",
    ),
    "triton.cooperative_reductions": (False, "it adds partial sums in an order that follows the SM count"),
    "triton.force_cooperative_reductions": (
        False,
        "it adds partial sums in an order that follows the SM count",
    ),
    "triton.multi_kernel": (
        0,
        "it would let a benchmark choose between kernels not all of which are checked",
    ),
    "triton.mix_order_reduction": (False, "it merges reductions whose order follows the grid"),
    "triton.tile_reductions": (False, "it would reorder the reduced dimensions"),
    "triton.prefer_nd_tiling": (False, "it would reorder the reduced dimensions"),
    "triton.native_matmul": (False, "matmuls have one form here, from a template"),
    "online_softmax": (False, "its running maximum makes the sum depend on the path"),
    "split_reductions": (True, "splits are placed at subtree borders by us"),
    "prologue_fusion": (False, "it would change the dtype that operands are loaded in"),
    "benchmark_fusion": (False, "fused and unfused are equal here; benchmarking them only costs time"),
    "fallback_random": (False, "eager random numbers follow the launch grid"),
    "implicit_fallbacks": (True, "ops without a lowering are answered by our own refusal"),
    "combo_kernels": (False, "it merges kernels through a code generator that is not checked"),
    "freezing": (False, "it evaluates parts of the graph with eager kernels"),
    "conv_1x1_as_mm": (False, "matmuls have one form here"),
    "cpp.enable_unsafe_math_opt_flag": (False, "it lets the compiler reorder additions"),
    "cpp.enable_floating_point_contract_flag": ("off", "it fuses multiply and add across ops"),
    "use_fast_math": (False, "it changes elementary functions with their surroundings"),
    "cpu_backend": ("cpp", "only the C++ code generator is canonical"),
    "cuda_backend": ("triton", "only the Triton code generator is canonical"),
}


def _validated(key: str, value: Any) -> tuple[str, Any]:
    known = _compat.inductor_config_defaults()
    name = key.replace("-", "_")
    if name not in known:
        candidates = [*known, *(_PREFIX + field.name for field in dataclasses.fields(Options))]
        close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"unknown option {key!r}{hint}")
    required, reason = REQUIRED_SETTINGS.get(name, (None, ""))
    if required is not None and value != required:
        raise OptionError(
            f"option {name!r} = {value!r} would break batch invariance: {reason}. Leave it at {required!r}."
        )
    return name, value


def parse(mode: str | None, options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options and Inductor's config patches for ``mode`` and ``options``.

    Raises OptionError for an unknown mode or key (with the nearest known one) and for an Inductor option
    that would break the contract.
    """
    if mode not in _MODES:
        close = difflib.get_close_matches(str(mode), [m for m in _MODES if m], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"unknown mode {mode!r}{hint}; known modes are {[m for m in _MODES if m]}")
    ours: dict[str, Any] = {}
    patches: dict[str, Any] = {**_compat.fusion_settings(), **_MODES[mode]}
    for key, value in (options or {}).items():
        if key.startswith(_PREFIX):
            ours[_own_field(key)] = value
        else:
            name, checked = _validated(key, value)
            patches[name] = checked
    return Options(**ours), patches


def _own_field(key: str) -> str:
    names = [field.name for field in dataclasses.fields(Options)]
    name = key.removeprefix(_PREFIX)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = (
        f"; did you mean {_PREFIX + close[0]!r}?" if close else f"; ours are {[_PREFIX + n for n in names]}"
    )
    raise OptionError(f"unknown option {key!r}{hint}")


def required_patches() -> dict[str, Any]:
    """REQUIRED_SETTINGS as config patches, without those this torch version does not know."""
    known = _compat.inductor_config_defaults()
    return {name: value for name, (value, _) in REQUIRED_SETTINGS.items() if name in known}
