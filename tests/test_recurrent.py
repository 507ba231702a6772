"""Recurrent layers, once Dynamo is told to trace them, are refused rather than compiled by strides."""

import pytest
import torch
from torch import nn

from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes.canonicalize import canonicalize

LAYERS = {
    "lstm": nn.LSTM(4, 5, batch_first=True),
    "gru": nn.GRU(4, 5),
    "rnn_tanh": nn.RNN(4, 5),
    "rnn_relu": nn.RNN(4, 5, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_are_refused(name):
    compiled = torch.compile(LAYERS[name], backend=lambda graph, _: canonicalize(graph), fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=True), pytest.raises(BatchInvarianceError) as caught:
        compiled(torch.randn(2, 3, 4))
    assert caught.value.op == name and "nn.Linear" in caught.value.remedy
