"""Recurrent layers: captured for our backend alone, and a step of a row has one set of bits."""

import warnings

import pytest
import torch
from devices import DEVICES
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import bi_inductor
from bi_inductor import capture
from bi_inductor.dry_run import SpecializedBatchError
from bi_inductor.errors import BatchInvarianceError
from bi_inductor.passes.canonicalize import canonicalize
from bi_inductor.row_mixing import row_mixing
from bi_inductor.testing import count_changed_rows, same_bits

BATCHES = (2, 3, 31, 64)


def compiled(fn, dynamic=True):
    torch._dynamo.reset()
    return torch.compile(fn, backend="batchinv", fullgraph=True, dynamic=dynamic)


def as_we_write_it(fn):
    """The rewrite of ``fn``, run eagerly: its definition without kernels."""
    torch._dynamo.reset()
    backend = capture.captured(lambda graph, _: canonicalize(graph))
    return torch.compile(fn, backend=backend, fullgraph=True)


def results(fn, parameters, *inputs):
    """All outputs of ``fn`` and the gradients of its inputs and parameters."""
    outputs = pytree.tree_leaves(fn(*inputs))
    weighted = sum((y * torch.linspace(-1, 1, y.numel()).to(y).reshape(y.shape)).sum() for y in outputs)
    wanted = [x for x in pytree.tree_leaves(inputs) if x.requires_grad]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(weighted, [*wanted, *parameters]))]


def rows_and_gradients(fn, x):
    """Outputs and input gradients of all rows, rows first; the last states come behind the outputs."""
    x = x.clone().requires_grad_()
    output, state = fn(x)
    states = [s.transpose(0, 1) for s in pytree.tree_leaves(state)]
    upstream = torch.linspace(-1, 1, output[0].numel()).to(output).reshape(output.shape[1:])
    (gradient,) = torch.autograd.grad(output, x, upstream.expand_as(output))
    return [t.detach() for t in (output, *states, gradient)]


def near(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


LAYERS = {
    "lstm": lambda: nn.LSTM(5, 9, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(5, 9, batch_first=True),
}


@pytest.fixture
def cudnn_in_fp32():
    """Eager layers on a GPU are cuDNN's, which multiplies fp32 as TF32 unless it is told not to; ours are fp32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.lengthy
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_keeps_its_bits_in_every_batch_and_at_every_length(name, device, cudnn_in_fp32):
    """One row compiled statically against batches compiled dynamically; and the first steps of longer sequences."""
    layer = LAYERS[name]().to(device)
    x = torch.randn(max(BATCHES), 6, 5).to(device)
    one = compiled(layer, dynamic=False)
    alone = [rows_and_gradients(one, x[row : row + 1]) for row in range(max(BATCHES))]
    together = compiled(layer)
    for batch in BATCHES:
        for got, rows in zip(rows_and_gradients(together, x[:batch]), zip(*alone, strict=True), strict=True):
            assert count_changed_rows(got, torch.cat(rows[:batch])) == 0
    near(rows_and_gradients(together, x), rows_and_gradients(layer, x), tolerance=1e-5)
    with torch.no_grad():
        longer, _ = together(torch.cat([x, x.flip(0)], dim=1))
        assert same_bits(longer[:, :6], torch.cat([rows[0] for rows in alone]))


def test_stock_changes_rows():
    """Negative control: the eager library that stock leaves these layers to."""
    layer = nn.GRU(64, 96, batch_first=True)
    x = torch.randn(64, 5, 64)
    stock = torch.compile(layer, backend="inductor")
    with torch.no_grad():
        alone = torch.cat([stock(x[row : row + 1])[0] for row in range(64)])
        assert count_changed_rows(stock(x)[0], alone) > 0


@pytest.mark.lengthy
def test_a_cell_in_a_loop_has_the_bits_of_the_layer():
    layer, cell = nn.GRU(4, 6), nn.GRUCell(4, 6)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    x = torch.randn(3, 5, 4)

    def loop(x):
        h, steps = x.new_zeros(x.shape[1], 6), []
        for now in x:
            h = cell(now, h)
            steps.append(h)
        return torch.stack(steps)

    with torch.no_grad():
        assert same_bits(compiled(loop, dynamic=False)(x), compiled(layer)(x)[0])


CONFIGURATIONS = {
    "lstm": (lambda: nn.LSTM(4, 6), (5, 3, 4)),
    "lstm of two projected layers": (lambda: nn.LSTM(4, 6, 2, proj_size=2, bidirectional=True), (5, 3, 4)),
    "lstm without biases": (lambda: nn.LSTM(4, 6, bias=False, proj_size=2, batch_first=True), (3, 5, 4)),
    "gru": (lambda: nn.GRU(4, 6, 2, bidirectional=True, batch_first=True), (3, 5, 4)),
    "gru of one step": (lambda: nn.GRU(4, 6, bias=False), (1, 3, 4)),
    "rnn of one sequence": (lambda: nn.RNN(4, 6, 2), (5, 4)),
    "rnn with relu": (lambda: nn.RNN(4, 6, nonlinearity="relu", bidirectional=True), (5, 3, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 6), (3, 4)),
    "gru cell of one row": (lambda: nn.GRUCell(4, 6, bias=False), (4,)),
    "rnn cell": (lambda: nn.RNNCell(4, 6, nonlinearity="relu"), (3, 4)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_definition_agrees_with_eager(name):
    make, shape = CONFIGURATIONS[name]
    layer, x = make().double(), torch.randn(shape).double().requires_grad_()
    parameters = list(layer.parameters())
    near(results(as_we_write_it(layer), parameters, x), results(layer, parameters, x))


def test_the_definition_agrees_with_eager_from_given_states():
    layer, x = nn.LSTM(4, 6, proj_size=2).double(), torch.randn(5, 3, 4).double().requires_grad_()
    given = (x, tuple(torch.randn(1, 3, width).double().requires_grad_() for width in (2, 6)))
    parameters = list(layer.parameters())
    near(results(as_we_write_it(layer), parameters, *given), results(layer, parameters, *given))


def test_bfloat16_is_near_float64():
    """Gradients of weights are one product over all steps: they do not lose digits with their number."""
    layer, x = nn.GRU(16, 32, batch_first=True), torch.randn(4, 100, 16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())
    narrow = nn.GRU(16, 32, batch_first=True)
    narrow.load_state_dict(layer.state_dict())
    narrow, layer, x = narrow.bfloat16(), layer.double(), x.bfloat16()
    got = results(as_we_write_it(narrow), list(narrow.parameters()), x)
    expected = results(layer, list(layer.parameters()), x.double())
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 0.03 * b.norm()


@pytest.mark.lengthy
def test_dropout_between_layers_is_drawn_by_slot():
    layer = nn.RNN(4, 8, 2, dropout=0.5)
    x = torch.randn(5, 31, 4)
    run = torch.no_grad()(compiled(layer))
    outputs = {}
    for batch in (31, 3, 2):
        torch.manual_seed(0)
        outputs[batch] = run(x[:, :batch])[0].transpose(0, 1)
        assert same_bits(outputs[batch], outputs[31][:batch])
    assert any(entry.form.startswith("Drawn") for entry in bi_inductor.certificates()[-1].entries)
    assert not torch.equal(outputs[31], layer.eval()(x)[0].transpose(0, 1))


@pytest.mark.lengthy
def test_layers_are_generated_for_a_gpu():
    layer, x = nn.LSTM(16, 32, batch_first=True).bfloat16(), torch.randn(8, 5, 16).bfloat16()
    found = bi_inductor.inspect(layer, x, target="sm_90", backward=True)
    forms = [entry.form for made in found.certificates for entry in made.entries]
    assert sum(form.startswith("Chain") for form in forms) >= 5


def test_rows_of_a_recurrent_layer_do_not_mix():
    layer, x = nn.GRU(4, 6, bidirectional=True), torch.randn(5, 3, 4)
    (outputs,) = row_mixing(layer, x, batch_dim=1).graphs
    assert len(outputs) == 2 and all(output.dim == 1 and not output.mixing for output in outputs)
    with pytest.raises(SpecializedBatchError):  # steps as rows
        row_mixing(layer, x, batch_dim=0)


# ---------------------------------------------------------------- what Dynamo is told, and what the user is


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


def graphs_seen(backend):
    seen = []

    def counting(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Around(), backend=backend(counting))(torch.randn(5, 3, 4))
    return len(seen)


def test_layers_are_captured_for_our_backend_alone():
    assert graphs_seen(capture.captured) == 1
    assert graphs_seen(lambda backend: backend) == 0  # stock: the whole function is eager
    assert torch._dynamo.config.allow_rnn is False


def test_a_function_that_dynamo_gives_up_is_reported_once(monkeypatch):
    """The guard of ``capture``: without it a layer would run eagerly, and nobody would say so."""
    monkeypatch.setattr(capture, "_SETTINGS", {"allow_rnn": False})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            graphs_seen(capture.captured)
    (message,) = [str(w.message) for w in caught if "runs eagerly as a whole" in str(w.message)]
    assert "test_recurrent.py" in message and "forward" in message


def test_packed_sequences_are_reported_with_the_remedy():
    layer = nn.LSTM(4, 6)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 4, 2])
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.compile(lambda x: layer(x), backend="batchinv")(packed)
            said = " ".join(str(w.message) for w in caught)
        except BatchInvarianceError as error:
            said = str(error)
    assert "pad_sequence" in said and "test_recurrent.py" in said


def test_packed_sequences_in_a_graph_are_refused():
    def packed(data, sizes, state, *weights):
        return torch.gru(data, sizes, state, [weights[0], weights[1]], False, 1, 0.0, False, False)

    graph = torch.fx.symbolic_trace(packed)
    with pytest.raises(BatchInvarianceError, match="PackedSequence") as caught:
        canonicalize(graph)
    assert "pad_sequence" in caught.value.remedy
