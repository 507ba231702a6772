"""What Dynamo does for functions that are compiled with our backend, and for no others.

Left alone, Dynamo runs ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, with the whole function that calls them, in eager mode
and tells nobody: the backend is not even asked. Here it traces them. Other functions that it gives up as a whole are
reported, and so is every graph break, also one with no op before it, of which the backend does not hear either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .graph_breaks import packed_refusal, report_graph_break, report_skipped_function

_Backend = TypeVar("_Backend", bound=Callable[..., Any])
_MARK = "_captured_by_bi_inductor"
#: Dynamo's settings for functions of ours.
_SETTINGS = {"allow_rnn": True}


def captured(backend: _Backend) -> _Backend:
    """Mark a backend for Dynamo as ours."""
    setattr(backend, _MARK, True)
    _install()
    return backend


def _is_ours(backend: Any) -> bool:
    """Whether the backend inside Dynamo's and torch.compile's wrappers, or a ``functools.partial``, is marked."""
    while not hasattr(backend, _MARK):
        inner = (
            getattr(backend, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn", "func")
        )
        backend = next(filter(None, inner), None)
        if backend is None:
            return False
    return True


def _install() -> None:
    """Wrap two methods of Dynamo, once; for other backends the wrappers only call what they wrap.

    A scope around each compile would open too late: Dynamo decides what to trace before it calls a backend. So these
    two stay; they go in where the backend is looked up, when nothing of it is compiling yet.
    """
    from torch._dynamo.convert_frame import ConvertFrameAssert
    from torch._dynamo.output_graph import OutputGraph

    if not hasattr(ConvertFrameAssert.__call__, _MARK):
        ConvertFrameAssert.__call__ = _marked(_converting(ConvertFrameAssert.__call__))  # type: ignore[method-assign]
        OutputGraph.compile_subgraph = _marked(_compiling(OutputGraph.compile_subgraph))  # type: ignore[method-assign]


def _marked(wrapper: Any) -> Any:
    setattr(wrapper, _MARK, True)
    return wrapper


def _converting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The conversion of one frame, with recurrent layers; a frame that is given up is reported."""
    from torch._dynamo import config
    from torch._dynamo.exc import TorchRuntimeError, Unsupported

    @functools.wraps(stock)
    def convert(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self._torchdynamo_orig_backend):
            return stock(self, frame, *args, **kwargs)
        try:
            with config.patch(**_SETTINGS):  # Dynamo holds its lock here
                return stock(self, frame, *args, **kwargs)
        except Unsupported as error:
            if not self._one_graph:
                report_skipped_function(frame.f_code, error)
            raise
        except TorchRuntimeError as error:
            raise packed_refusal(error) or error from None

    return convert


def _compiling(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The end of one graph, which a graph break may be."""

    @functools.wraps(stock)
    def compile_subgraph(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self.compiler_fn):
            report_graph_break(reason)
        return stock(self, tx, reason, *args, **kwargs)

    return compile_subgraph
