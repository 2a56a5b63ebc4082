"""Classifier, tagger, generator, stacked and bidirectional models: formulas and training."""

import pytest
import torch
from torch import nn

from rnnfast.models.elman import ElmanRNN
from rnnfast.models.sequence import SequenceClassifier, SequenceGenerator, SequenceTagger
from rnnfast.models.stacked import BidirectionalRNN, MultiLayerRNN, RNNModel

CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
LENGTHS = [3, 7, 1, 5]
F64 = {"dtype": torch.float64}


def build(kind, *sizes, **options):
    torch.manual_seed(0)
    return kind(*(sizes or (3, 5, 2)), **{**F64, **options})


def torchs(model):
    """Layers of torch.nn with the weights of the model's layers."""
    ours = model.rnn
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(ours.mode, nn.RNN)
    options = {"nonlinearity": ours.nonlinearity} if kind is nn.RNN else {}
    theirs = kind(
        ours.input_size,
        ours.hidden_size,
        ours.num_layers,
        batch_first=True,
        bidirectional=ours.bidirectional,
        **F64,
        **options,
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs


def initial(model, batch):
    """A state that is not zeros."""
    state = model.init_hidden(batch)
    if isinstance(state, tuple):
        return tuple(torch.randn_like(each) for each in state)
    return torch.randn_like(state)


def row(state, b):
    if isinstance(state, tuple):
        return tuple(each[:, b : b + 1] for each in state)
    return state[:, b : b + 1]


def hidden(state):
    return state[0] if isinstance(state, tuple) else state


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("kind", "options", "read"),
    [
        (SequenceClassifier, {}, lambda y: y[:, -1]),
        (RNNModel, {"num_layers": 2}, lambda y: y[:, -1]),
        (SequenceTagger, {"num_layers": 2}, lambda y: y),
        (MultiLayerRNN, {}, lambda y: y),
        (BidirectionalRNN, {"reading": "every_step"}, lambda y: y),
        (BidirectionalRNN, {"reading": "last_step", "num_layers": 2}, lambda y: y[:, -1]),
        (
            BidirectionalRNN,
            {"reading": "ends", "num_layers": 2},
            lambda y: torch.cat([y[:, -1, :5], y[:, 0, 5:]], 1),
        ),
    ],
)
def test_each_sequence_is_as_if_alone_in_torch(cell, kind, options, read):
    model = build(kind, cell=cell, **options)
    theirs, state = torchs(model), initial(model, 4)
    x = torch.randn(4, 7, 3, **F64)
    output, final = model(x, state, lengths=LENGTHS)
    weight = torch.randn(7, 2, **F64)
    ours, alone = 0, 0
    for b, length in enumerate(LENGTHS):
        y, expected_final = theirs(x[b : b + 1, :length], row(state, b))
        expected = nn.functional.linear(read(y), model.fc.weight, model.fc.bias)
        actual = output[b : b + 1]
        if output.dim() == 3:
            assert not actual[:, length:].any()
            actual = actual[:, :length]
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(row(final, b), expected_final, rtol=1e-11, atol=1e-11)
        ours += (actual.squeeze(0) * weight[: actual.shape[1] if output.dim() == 3 else 1]).sum()
        alone += (expected.squeeze(0) * weight[: length if output.dim() == 3 else 1]).sum()
    actual = gradients(model, ours)
    expected = torch.autograd.grad(alone, [*theirs.parameters(), *model.fc.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert all(gradient.any() for gradient in expected)


def generator_steps(model, z, steps, state):
    """The generator's formula, computed by a layer of torch.nn step by step."""
    layer, outputs = torchs(model), []
    layer.weight_ih_l0, layer.weight_hh_l0 = model.rnn.weight_ih_l0, model.rnn.weight_hh_l0
    layer.bias_ih_l0, layer.bias_hh_l0 = model.rnn.bias_ih_l0, model.rnn.bias_hh_l0
    y = model.fc(hidden(state)[0])
    for _ in range(steps):
        h, state = layer(torch.cat([z, y], 1).unsqueeze(1), state)
        y = model.fc(h[:, 0])
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [(3, 5, 2), (1, 2, 6)])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_generator_feeds_its_output_back(cell, sizes, steps):
    model = build(SequenceGenerator, *sizes, cell=cell)
    state = initial(model, 4)
    z = torch.randn(4, sizes[0], requires_grad=True, **F64)
    weight = torch.randn(4, steps, sizes[2], **F64)
    results = []
    for run in (model, lambda *args: generator_steps(model, *args)):
        output, final = run(z, steps, state)
        loss = (output * weight).sum() + hidden(final).square().sum()
        inputs = [z, *model.parameters()]
        results.append((output, final, torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert all(gradient.any() for gradient in results[1][2])


@pytest.mark.parametrize("cell", CELLS)
def test_a_generated_sequence_ends_where_it_is_told_to(cell):
    model = build(SequenceGenerator, cell=cell)
    z, state = torch.randn(4, 3, **F64), initial(model, 4)
    lengths = [3, 0, 6, 1]
    output, final = model(z, 6, state, lengths=lengths)
    for b, length in enumerate(lengths):
        expected, expected_final = row(state, b), row(state, b)
        assert not output[b, length:].any()
        if length > 0:
            expected, expected_final = model(z[b : b + 1], length, row(state, b))
            torch.testing.assert_close(output[b : b + 1, :length], expected)
        torch.testing.assert_close(row(final, b), expected_final)


@pytest.mark.parametrize("cell", CELLS)
def test_a_generator_goes_on_from_its_state(cell):
    model = build(SequenceGenerator, cell=cell)
    z = torch.randn(4, 3, **F64)
    whole, last = model(z, 8)
    first, state = model(z, 5)
    second, final = model(z, 3, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(final, last)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_the_generator(cell):
    model = build(SequenceGenerator, 2, 2, 2, cell=cell)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(z, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, given, (z, 3), {"lengths": [3, 1]})[0]

    z = torch.randn(2, 2, requires_grad=True, **F64)
    assert torch.autograd.gradcheck(run, (z, *parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_one_to_one_is_a_sequence_of_one_step(cell):
    tagger, classifier = build(SequenceTagger, cell=cell), build(SequenceClassifier, cell=cell)
    x = torch.randn(4, 1, 3, **F64)
    tags, _ = tagger(x)
    classes, _ = classifier(x)
    torch.testing.assert_close(tags[:, 0], classes)


def test_default_cells_layers_and_readings():
    assert [build(kind).rnn.mode for kind in (SequenceClassifier, SequenceTagger)] == ["LSTM"] * 2
    assert build(SequenceGenerator).rnn.mode == "LSTM"
    modes = [build(kind).rnn.mode for kind in (RNNModel, MultiLayerRNN, BidirectionalRNN)]
    assert modes == ["RNN_TANH"] * 3
    assert build(RNNModel).rnn.num_layers == 1
    assert build(MultiLayerRNN).rnn.num_layers == 2
    assert build(BidirectionalRNN).reading == "ends"


def learn(model, loss, steps, rate=0.01):
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    model.eval()


def first_bit(batch, steps=6):
    """Random bits of random lengths, padded with NaN; the answer is the first bit."""
    bits = torch.randint(2, (batch, steps))
    lengths = torch.randint(1, steps + 1, (batch,))
    x = nn.functional.one_hot(bits, 2).float()
    x[torch.arange(steps) >= lengths.unsqueeze(1)] = torch.nan
    return x, lengths, bits[:, 0]


def accuracy(model, x, lengths, target):
    output, _ = model(x, lengths=lengths)
    return (output.argmax(1) == target).float().mean().item()


@pytest.mark.parametrize(
    ("kind", "cell"), [*[(SequenceClassifier, cell) for cell in CELLS], (RNNModel, "rnn_tanh")]
)
def test_a_classifier_learns_what_came_first(kind, cell):
    model = build(kind, 2, 16, 2, cell=cell, dtype=torch.float32)
    x, lengths, target = first_bit(256)
    learn(
        model,
        lambda: nn.functional.cross_entropy(model(x, lengths=lengths)[0], target),
        steps=150,
    )
    assert accuracy(model, *first_bit(500)) > 0.99


@pytest.mark.parametrize(
    ("kind", "cell"), [*[(SequenceTagger, cell) for cell in CELLS], (MultiLayerRNN, "rnn_tanh")]
)
def test_a_tagger_learns_to_compare_with_two_steps_before(kind, cell):
    def draw(batch):
        bits = torch.randint(2, (batch, 10))
        return nn.functional.one_hot(bits, 2).float(), (bits ^ bits.roll(2, 1))[:, 2:]

    model = build(kind, 2, 24, 2, cell=cell, dtype=torch.float32)
    x, target = draw(128)
    learn(
        model,
        lambda: nn.functional.cross_entropy(model(x)[0][:, 2:].flatten(0, 1), target.flatten()),
        steps=300,
        rate=0.02,
    )
    x, target = draw(100)
    assert (model(x)[0][:, 2:].argmax(2) == target).float().mean() > 0.99


@pytest.mark.parametrize("cell", CELLS)
def test_a_generator_learns_to_spell(cell):
    words = ["hello", "hallo", "salut", "ciao!"]
    letters = sorted(set("".join(words)))
    target = torch.tensor([[letters.index(letter) for letter in word] for word in words])
    model = build(SequenceGenerator, 4, 24, len(letters), cell=cell, dtype=torch.float32)
    z = torch.eye(4)
    learn(
        model,
        lambda: nn.functional.cross_entropy(model(z, 5)[0].flatten(0, 1), target.flatten()),
        steps=200,
    )
    spelt = ["".join(letters[i] for i in word) for word in model(z, 5)[0].argmax(2)]
    assert spelt == words


def test_both_directions_learn_a_tag_that_depends_on_both_neighbours():
    def draw(batch):
        bits = torch.randint(2, (batch, 10))
        target = bits.roll(1, 1) ^ bits.roll(-1, 1)
        return nn.functional.one_hot(bits, 2).float(), target[:, 1:-1]

    options = {"num_layers": 2, "reading": "every_step", "dtype": torch.float32}
    model = build(BidirectionalRNN, 2, 16, 2, **options)
    x, target = draw(128)
    learn(
        model,
        lambda: nn.functional.cross_entropy(model(x)[0][:, 1:-1].flatten(0, 1), target.flatten()),
        steps=300,
        rate=0.02,
    )
    x, target = draw(100)
    assert (model(x)[0][:, 1:-1].argmax(2) == target).float().mean() > 0.99


@pytest.mark.parametrize(("reading", "learns"), [("ends", True), ("last_step", False)])
def test_the_backward_direction_knows_the_beginning_at_the_first_step_only(reading, learns):
    model = build(BidirectionalRNN, 2, 16, 2, reading=reading, dtype=torch.float32)
    with torch.no_grad():
        model.fc.weight[:, :16] = 0  # the forward direction is not read
    model.fc.weight.register_hook(lambda g: torch.cat([torch.zeros(2, 16), g[:, 16:]], 1))
    x, lengths, target = first_bit(256)
    long = lengths > 1  # sequences of more than one step
    x, lengths, target = x[long], lengths[long], target[long]
    learn(
        model,
        lambda: nn.functional.cross_entropy(model(x, lengths=lengths)[0], target),
        steps=150,
    )
    assert not model.fc.weight[:, :16].any()
    x, lengths, target = first_bit(1000)
    long = lengths > 1
    reached = accuracy(model, x[long], lengths[long], target[long])
    assert (reached > 0.99) if learns else (0.4 < reached < 0.6)


def test_what_the_backward_direction_has_read_at_the_last_step():
    for reading, has_read in [("ends", [True] * 7), ("last_step", [False] * 6 + [True])]:
        model = build(BidirectionalRNN, reading=reading)
        nn.init.zeros_(model.fc.weight[:, :5].detach())
        x = torch.randn(1, 7, 3, requires_grad=True, **F64)
        model(x)[0].sum().backward()
        assert x.grad[0].any(1).tolist() == has_read


def test_a_tagger_of_one_elman_layer_is_an_elman_network():
    tagger, elman = build(SequenceTagger, cell="rnn_tanh"), build(ElmanRNN)
    elman.load_state_dict(tagger.state_dict())
    x = torch.randn(4, 6, 3, **F64)
    output, state = tagger(x)
    expected, final = elman(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, final.unsqueeze(0))


@pytest.mark.parametrize(
    ("z", "steps", "lengths", "error", "words"),
    [
        ((4, 1, 3), 5, None, ValueError, r"shape \(batch, features\), got \(4, 1, 3\)"),
        ((4, 2), 5, None, RuntimeError, "Expected 3, got 2"),
        ((4, 3), 0, None, ValueError, "steps must be greater than zero, got 0"),
        ((4, 3), 5, [1, 2, 3, 6], ValueError, "between 0 and 5, got 6"),
        ((4, 3), 5, [1, 2, 3], RuntimeError, r"lengths of shape \(4,\)"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_what_cannot_be_generated_is_refused(cell, z, steps, lengths, error, words):
    with pytest.raises(error, match=words):
        build(SequenceGenerator, cell=cell)(torch.zeros(z, **F64), steps, lengths=lengths)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_generator_refuses_a_state_of_another_shape(cell, batch):
    model = build(SequenceGenerator, cell=cell)
    words = rf"Expected hidden.* size \(1, 4, 5\), got \[1, {batch}, 5\]"
    with pytest.raises(RuntimeError, match=words):
        model(torch.zeros(4, 3, **F64), 2, model.init_hidden(batch))


@pytest.mark.parametrize("cell", CELLS)
def test_a_generator_refuses_the_state_of_another_cell(cell):
    other = build(SequenceGenerator, cell="gru" if cell == "lstm" else "lstm")
    with pytest.raises(RuntimeError, match="hidden"):
        build(SequenceGenerator, cell=cell)(torch.zeros(4, 3, **F64), 2, other.init_hidden(4))
