"""Recurrent layers, which reach the backend only under ``torch._dynamo.config.allow_rnn``: refused by name.

Their decompositions call ``linear`` where no rewrite can see it, and that becomes one op or another by strides.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from bi_inductor.certificate import source_line
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes.retarget import Retarget


def _refusal(node: Node) -> BatchInvarianceError:
    name = getattr(node.target, "__name__", str(node.target))
    reason = "its projections become addmm or mm + add by the strides of the input"
    remedy = "write the cell with nn.Linear, or leave torch._dynamo.config.allow_rnn off and the layer eager"
    return BatchInvarianceError(name, reason, remedy, source_line(node))


RECURRENT = Retarget(
    name="recurrent",
    targets=frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}),
    refuse=_refusal,
)
