"""The common behaviour of the recurrent models: lengths, states, options, errors."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rnnfast.models.elman import ElmanRNN
from rnnfast.models.jordan import JordanRNN
from rnnfast.models.sequence import SequenceClassifier, SequenceGenerator, SequenceTagger
from rnnfast.models.simple_rnn import SimpleRNN
from rnnfast.models.stacked import BidirectionalRNN, MultiLayerRNN, RNNModel

CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
TEXTBOOK = [(SimpleRNN, {}), (ElmanRNN, {}), (JordanRNN, {})]
LAYERED = [
    *[(SequenceClassifier, {"cell": cell, "num_layers": 2}) for cell in CELLS],
    *[(SequenceTagger, {"cell": cell}) for cell in CELLS],
    (RNNModel, {}),
    (MultiLayerRNN, {}),
    *[(BidirectionalRNN, {"reading": reading}) for reading in ("ends", "last_step", "every_step")],
    (BidirectionalRNN, {"reading": "last_step", "cell": "lstm", "num_layers": 2}),
]
READERS = [*TEXTBOOK, *LAYERED]
GENERATORS = [(SequenceGenerator, {"cell": cell}) for cell in CELLS]
FORWARD_ONLY = [case for case in READERS if case[0] is not BidirectionalRNN]


def build(kind, options, sizes=(3, 5, 2), **more):
    torch.manual_seed(0)
    return kind(*sizes, **{"dtype": torch.float64, **options, **more})


def tensors(result):
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


def gradients(model, x, lengths):
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = sum(each.square().sum() for each in tensors(model(x, lengths=lengths)))
    loss.backward()
    return x.grad, *[parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("kind", "options"), READERS)
@pytest.mark.parametrize("padding", [0.0, 1e30, torch.inf, torch.nan])
def test_padding_has_no_influence(kind, options, padding):
    model = build(kind, options)
    lengths = torch.tensor([4, 7, 1, 0, 6])
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    beyond = torch.arange(7) >= lengths.unsqueeze(1)
    padded = x.masked_fill(beyond.unsqueeze(2), padding)
    expected = tensors(model(x, lengths=lengths))
    for actual, each in zip(tensors(model(padded, lengths=lengths)), expected, strict=True):
        assert torch.equal(actual, each)
    if expected[0].dim() == 3:
        assert not expected[0][beyond].any()
        assert expected[0][~beyond].all()
    of_padded, of_others = gradients(model, padded, lengths), gradients(model, x, lengths)
    for actual, each in zip(of_padded, of_others, strict=True):
        assert torch.equal(actual, each)
        assert each.any()
    assert not of_padded[0][beyond].any()


@pytest.mark.parametrize(("kind", "options"), READERS)
def test_sequences_in_any_order_are_as_if_alone(kind, options):
    model = build(kind, options)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 6, 1, 4)]
    padded = pad_sequence(sequences, batch_first=True)
    lengths = [len(each) for each in sequences]
    together = tensors(model(padded, lengths=lengths))
    for given in (torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32), tuple(lengths)):
        for actual, each in zip(tensors(model(padded, lengths=given)), together, strict=True):
            assert torch.equal(actual, each)
    for b, sequence in enumerate(sequences):
        output, *states = tensors(model(sequence.unsqueeze(0)))
        own = together[0][b : b + 1]
        own = own[:, : len(sequence)] if own.dim() == 3 else own
        torch.testing.assert_close(own, output, rtol=1e-11, atol=1e-11)
        for state, alone in zip(together[1:], states, strict=True):
            batch_dim = 0 if state.dim() == 2 else 1
            torch.testing.assert_close(state.narrow(batch_dim, b, 1), alone)


@pytest.mark.parametrize(("kind", "options"), FORWARD_ONLY)
def test_the_state_carries_the_past(kind, options):
    model = build(kind, options)
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    whole, last = model(x)
    first, state = model(x[:, :4])
    second, final = model(x[:, 4:], state)
    joined = torch.cat([first, second], 1) if whole.dim() == 3 else second
    torch.testing.assert_close(joined, whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(final, last, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(second, model(x[:, 4:])[0])


@pytest.mark.parametrize(("kind", "options"), READERS)
def test_an_empty_sequence_leaves_the_state_as_it_was(kind, options):
    model = build(kind, options)
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    states = [torch.randn_like(each) for each in tensors((None, model.init_hidden(3)))[1:]]
    _, *finals = tensors(
        model(x, states[0] if len(states) == 1 else tuple(states), lengths=[0, 4, 0])
    )
    for before, after in zip(states, finals, strict=True):
        batch_dim = 0 if before.dim() == 2 else 1
        empty = torch.tensor([0, 2])
        assert torch.equal(
            after.index_select(batch_dim, empty), before.index_select(batch_dim, empty)
        )
        assert not torch.equal(after, before)


def run(model, x, state=None, lengths=None):
    """Run any model on a batch (B, T, I)."""
    if isinstance(model, SequenceGenerator):
        return model(x[:, 0], x.shape[1], state, lengths=lengths)
    return model(x, state, lengths=lengths)


@pytest.mark.parametrize(("kind", "options"), [*READERS, *GENERATORS])
def test_no_state_is_a_state_of_zeros(kind, options):
    model = build(kind, options)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    zeros = model.init_hidden(4)
    assert not any(each.any() for each in tensors((x, zeros))[1:])
    results = tensors(run(model, x))
    for actual, expected in zip(tensors(run(model, x, zeros)), results, strict=True):
        assert torch.equal(actual, expected)
    for state, after in zip(tensors((x, zeros))[1:], results[1:], strict=True):
        assert (state.shape, state.dtype) == (after.shape, after.dtype)


@pytest.mark.parametrize(("kind", "options"), [*READERS, *GENERATORS])
def test_a_copy_by_state_dict_and_other_backends_agree(kind, options):
    model = build(kind, options)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    lengths = [5, 1, 3, 2]
    expected = tensors(run(model, x, lengths=lengths))
    for backend in ("fused", "aten", "reference"):
        other = kind(3, 5, 2, **options, dtype=torch.float64, backend=backend)
        other.load_state_dict(model.state_dict())
        for actual, each in zip(tensors(run(other, x, lengths=lengths)), expected, strict=True):
            torch.testing.assert_close(actual, each, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "options"), [*READERS, *GENERATORS])
def test_half_precision_and_autocast(kind, options):
    model = build(kind, options, dtype=torch.float32)
    x = torch.randn(4, 5, 3)
    expected, *_ = tensors(run(model, x))
    with torch.autocast("cpu", torch.bfloat16):
        cast, *_ = tensors(run(model, x))
    halved, *_ = tensors(run(copy.deepcopy(model).bfloat16(), x.bfloat16()))
    assert halved.dtype is torch.bfloat16
    for actual in (cast, halved):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *TEXTBOOK,
        *LAYERED[:1],
        *LAYERED[-2:],
        *(pytest.param(*generator, marks=pytest.mark.full) for generator in GENERATORS),
    ],
)
def test_each_compiles_into_one_graph(kind, options):
    torch.compiler.reset()
    model = build(kind, options)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    expected = tensors(run(model, x))
    model.compile(backend="aot_eager", fullgraph=True)
    for actual, each in zip(tensors(run(model, x)), expected, strict=True):
        torch.testing.assert_close(actual, each)


def nodes(tensor):
    """The number of nodes in the autograd graph."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize(("kind", "options"), [*READERS, *GENERATORS])
def test_nothing_loops_over_time_but_a_gru_that_feeds_back(kind, options):
    model = build(kind, options)
    x = torch.randn(4, 40, 3, dtype=torch.float64)
    short, long = (nodes(run(model, x[:, :steps])[0]) for steps in (4, 40))
    loops = kind is SequenceGenerator and options["cell"] == "gru"
    assert (short < long) if loops else (short == long)


@pytest.mark.parametrize(("kind", "options"), LAYERED)
def test_dropout_reaches_between_the_layers_and_before_the_output(kind, options):
    options = {**options, "num_layers": 2}
    model, plain = build(kind, options, dropout=0.5), build(kind, options)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], plain(x)[0])
    model.train().dropout.eval()
    assert not torch.equal(model(x)[0], model(x)[0])
    certain = build(kind, options, dropout=1.0)
    assert torch.equal(certain(x)[0], certain.fc.bias.expand_as(certain(x)[0]))


def test_a_single_layer_takes_dropout_without_a_warning(recwarn):
    build(SequenceTagger, {}, dropout=0.5)
    assert not recwarn


@pytest.mark.parametrize(("kind", "options"), LAYERED)
@pytest.mark.parametrize(
    ("x", "lengths", "error", "words"),
    [
        ((5, 3), None, ValueError, r"\(batch, time, features\), got \(5, 3\)"),
        ((4, 5, 3, 1), None, ValueError, r"\(batch, time, features\), got \(4, 5, 3, 1\)"),
        ((4, 5, 2), None, RuntimeError, "Expected 3, got 2"),
        ((4, 0, 3), None, RuntimeError, "sequence length to be larger than 0"),
        ((4, 5, 3), [1, 2, 3], RuntimeError, r"lengths of shape \(4,\)"),
        ((4, 5, 3), [1, 2, 3, 6], ValueError, "between 0 and 5, got 6"),
        ((4, 5, 3), [1.0, 2, 3, 4], TypeError, "lengths should be integers"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, x, lengths, error, words):
    with pytest.raises(error, match=words):
        build(kind, options)(torch.zeros(x, dtype=torch.float64), lengths=lengths)


@pytest.mark.parametrize(("kind", "options"), LAYERED)
def test_a_state_of_another_batch_is_refused(kind, options):
    model = build(kind, options)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        model(torch.zeros(4, 5, 3, dtype=torch.float64), model.init_hidden(3))


@pytest.mark.parametrize("kind", [kind for kind, _ in TEXTBOOK])
def test_a_pair_is_no_state_of_a_textbook_network(kind):
    model = build(kind, {})
    state = model.init_hidden(4)
    with pytest.raises(RuntimeError, match=r"Expected (hidden|previous_output) size .*, got tuple"):
        model(torch.zeros(4, 5, 3, dtype=torch.float64), (state, state))


@pytest.mark.parametrize(
    "kind", [SequenceClassifier, SequenceTagger, RNNModel, MultiLayerRNN, BidirectionalRNN]
)
@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((0, 1, 1), {}, "input_size must be greater than zero, got 0"),
        ((1, 0, 1), {}, "hidden_size must be greater than zero, got 0"),
        ((1, 1, 0), {}, "output_size must be greater than zero, got 0"),
        ((1, 1, 1), {"num_layers": 0}, "num_layers must be greater than zero"),
        ((1, 1, 1), {"cell": "LSTM"}, "cell should be one of lstm, gru, .*, got 'LSTM'"),
        ((1, 1, 1), {"dropout": 1.5}, "probability"),
        ((1, 1, 1), {"dropout": 1.5, "num_layers": 2}, "probability"),
        ((1, 1, 1), {"backend": "fast"}, "backend should be one of .* 'fast'"),
    ],
)
def test_impossible_models_are_refused(kind, sizes, options, words):
    with pytest.raises(ValueError, match=words):
        kind(*sizes, **options)


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match=r"reading should be one of ends, .*, got 'first'"):
        BidirectionalRNN(1, 1, 1, reading="first")


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((0, 1, 1), {}, "input_size must be greater than zero, got 0"),
        ((1, 1, -1), {}, "output_size must be greater than zero, got -1"),
        ((1, 0, 1), {}, "hidden_size must be greater than zero, got 0"),
        ((1, 1, 1), {"cell": "elman"}, "cell should be one of"),
    ],
)
def test_impossible_generators_are_refused(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        SequenceGenerator(*sizes, **options)
