"""Typical textbook programs run with these models, or get an error that says how to change them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnnfast.models import (
    BidirectionalRNN,
    CharLSTM,
    ElmanRNN,
    JordanRNN,
    MultiLayerRNN,
    RNNModel,
    Seq2SeqLSTM,
    SequenceClassifier,
    SequenceGenerator,
    SequenceTagger,
    SimpleRNN,
)
from rnnfast.models.results import StepLogits

TEXTBOOK = [SimpleRNN, ElmanRNN, JordanRNN]
LAYERED = [RNNModel, MultiLayerRNN, BidirectionalRNN, SequenceClassifier, SequenceTagger]
TOKEN = torch.tensor([[3]])


def result_of(kind):
    """The result of a model for a batch, and a target of the same shape as its output."""
    model = kind(3, 5, 2)
    result = (
        model(torch.randn(4, 3), 6) if kind is SequenceGenerator else model(torch.randn(4, 6, 3))
    )
    return result, torch.zeros_like(result[0])


@pytest.mark.parametrize("kind", [*TEXTBOOK, *LAYERED, SequenceGenerator])
def test_sizes_are_attributes(kind):
    model = kind(3, 5, 2)
    assert (model.input_size, model.hidden_size, model.output_size) == (3, 5, 2)


def test_sizes_of_stacks_and_of_models_of_tokens():
    for kind in LAYERED:
        assert kind(3, 5, 2, num_layers=4).num_layers == 4
    for kind in (RNNModel, MultiLayerRNN):
        with pytest.raises(TypeError, match="positional argument"):
            kind(10, 20, 3, 5)  # input, hidden, layers and output in the order of many programs
    assert (RNNModel(3, 5, 2).num_layers, MultiLayerRNN(3, 5, 2).num_layers) == (1, 2)
    assert SequenceGenerator(3, 5, 2).num_layers == 1
    model = CharLSTM(7, 5, 3, embedding_size=4)
    sizes = (model.vocab_size, model.hidden_size, model.num_layers, model.embedding_size)
    assert sizes == (7, 5, 3, 4)
    model = Seq2SeqLSTM(7, 6, 5, num_layers=3, embedding_size=4)
    assert (model.input_vocab_size, model.output_vocab_size) == (7, 6)
    assert (model.hidden_size, model.num_layers, model.embedding_size) == (5, 3, 4)


@pytest.mark.parametrize("kind", TEXTBOOK)
def test_a_chapters_loop_over_steps(kind):
    model = kind(3, 5, 2)
    hidden, x = model.init_hidden(), torch.randn(1, 4, 3)
    for step in range(4):
        output, hidden = model(x[:, step], hidden)
    torch.testing.assert_close(output, model(x)[0][:, -1])


def test_arguments_have_the_names_that_people_write():
    x = torch.randn(1, 4, 3)
    for kind in (SimpleRNN, ElmanRNN, *LAYERED):
        kind(3, 5, 2)(x, hidden=kind(3, 5, 2).init_hidden())
    model = JordanRNN(3, 5, 2)
    model(x, previous_output=model.init_hidden())
    model = CharLSTM(7, 5)
    model(TOKEN, hidden=model.init_hidden())
    model = Seq2SeqLSTM(7, 6, 5)
    assert model(TOKEN, TOKEN, teacher_forcing_ratio=0.5).shape == (1, 1, 6)
    assert model.init_hidden()[0].shape == (1, 1, 5)


@pytest.mark.parametrize("kind", TEXTBOOK)
def test_the_state_of_one_sequence_for_a_batch(kind):
    model = kind(3, 5, 2)
    with pytest.raises(
        RuntimeError,
        match=r"got \[1, \d\]; init_hidden\(4\) makes a state of zeros for a batch of 4\. "
        r"An input sequence is \(batch, time, features\)",
    ):
        model(torch.randn(4, 3), model.init_hidden())


@pytest.mark.parametrize("ratio", [0.5, 0, 1])
def test_a_ratio_in_the_place_of_lengths(ratio):
    words = rf"got {ratio}; did you mean model\(source, target, teacher_forcing_ratio={ratio}\)\?"
    with pytest.raises(TypeError, match=words):
        Seq2SeqLSTM(7, 6, 5)(TOKEN, TOKEN, ratio)


# ---- the pair used as a tensor ----


@pytest.mark.parametrize("kind", [*TEXTBOOK, *LAYERED, SequenceGenerator])
@pytest.mark.parametrize(
    ("use", "error"),
    [
        (nn.MSELoss(), TypeError),
        (lambda result, target: torch.max(result, 1), TypeError),
        (lambda result, target: F.softmax(result, dim=1), TypeError),
        (lambda result, target: target.add(result), TypeError),
        (lambda result, target: torch.stack([target, result]), TypeError),
        (lambda result, target: result.shape, AttributeError),
        (lambda result, target: result.argmax(1), AttributeError),
        (lambda result, target: torch.max(result.data, 1), AttributeError),
    ],
)
def test_a_pair_is_no_tensor_and_says_so(kind, use, error):
    result, target = result_of(kind)
    with pytest.raises(error, match=r"returned a pair .* write `output, state = model\(\.\.\.\)`"):
        use(result, target)


@pytest.mark.parametrize(
    "use",
    [
        lambda result, target: result[..., 0],
        lambda result, target: result[:, -1],
        lambda result, target: result[None],
        lambda result, target: result[target > 0],
        lambda result, target: result - target,
        lambda result, target: target - result,
        lambda result, target: result**2,
        lambda result, target: result + 1,
        lambda result, target: result + result,
        lambda result, target: 2 * result,
        lambda result, target: result * 2,
        lambda result, target: result @ target,
        lambda result, target: target @ result,
        lambda result, target: -result,
        lambda result, target: result > 0.5,
        lambda result, target: target > result,
        lambda result, target: result == target,
        lambda result, target: target == result,
        lambda result, target: result != target,
        lambda result, target: float(result),
    ],
)
def test_operators_of_tensors_refuse_a_pair(use):
    result, target = result_of(RNNModel)
    with pytest.raises(TypeError, match=r"returned a pair .* write `output, state = model"):
        use(result, target)


def test_a_pair_of_a_char_lstm():
    with pytest.raises(TypeError, match=r"returned a pair .* cross_entropy takes the output alone"):
        F.cross_entropy(CharLSTM(7, 5)(TOKEN), TOKEN.flatten())


def test_a_pair_is_else_a_tuple():
    result = RNNModel(3, 5, 2)(torch.randn(4, 6, 3))
    output, state = result
    assert result[0] is result[-2] is result.output is output
    assert result[1] is result[-1] is result.state is state
    assert result[1:] == (state,)
    assert result == (output, state)
    assert (output, state) == result
    assert result != (output,)
    assert (result != (output, state)) is False
    assert {result: 1}[result] == 1
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result)
    assert torch.equal(again[0], output)


def test_a_pair_passes_through_what_takes_pairs():
    model, x = RNNModel(3, 5, 2), torch.randn(6, 4, 7, 3)
    output, state = torch.func.vmap(model)(x)
    assert (output.shape, state.shape) == ((6, 4, 2), (6, 1, 4, 5))
    torch.utils.checkpoint.checkpoint(model, x[0], use_reentrant=False)[0].sum().backward()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model(x[0]))[0], model(x[0])[0])
        program = torch.export.export(model.eval(), (x[0],))
        torch.export.save(program, io.BytesIO())
        torch.testing.assert_close(program.module()(x[0])[0], model(x[0])[0])


# ---- a softmax over the time axis ----


@pytest.mark.parametrize(
    "probabilities",
    [
        lambda logits: F.softmax(logits, dim=1),
        lambda logits: F.softmax(logits / 0.8, dim=1).data,
        lambda logits: torch.softmax(logits.detach().div(0.8), 1),
        lambda logits: torch.softmax(logits[-1], dim=0),
        lambda logits: logits.softmax(-2),
        lambda logits: F.softmax(logits),
        lambda logits: nn.LogSoftmax(dim=1)(logits),
        lambda logits: F.softmin(logits, dim=1),
        lambda logits: F.gumbel_softmax(logits, 0.5, False, 1e-10, 1),
        lambda logits: torch.special.log_softmax(logits, 1),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_probabilities_that_would_all_be_one(probabilities, training):
    logits, _ = CharLSTM(7, 5).train(training)(TOKEN)
    with pytest.raises(ValueError, match=r"has length 1, .* dim=-1, or logits\[:, -1\]"):
        probabilities(logits)


@pytest.mark.parametrize(
    "probabilities",
    [
        lambda logits: F.softmax(logits / 0.8, dim=-1),
        lambda logits: F.softmax(logits / 0.8, dim=2),
        lambda logits: F.softmax(logits[:, -1] / 0.8, dim=1),
        lambda logits: F.softmax(logits.squeeze() / 0.8, dim=0),
        lambda logits: F.softmax(logits.view(-1) / 0.8),
        lambda logits: F.softmax(logits.transpose(1, 2) / 0.8, dim=1),
        lambda logits: logits.div(0.8).exp() / logits.div(0.8).exp().sum(),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_probabilities_as_they_should_be(probabilities):
    model = CharLSTM(7, 5)
    y, _ = model.lstm(model.embedding(TOKEN))
    expected = (model.head(y) / 0.8).softmax(-1).flatten()
    found = probabilities(model(TOKEN)[0]).flatten()
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert type(found.multinomial(1)) is torch.Tensor


def test_logits_of_a_step_are_else_a_tensor():
    model = CharLSTM(7, 5)
    logits, _ = model(TOKEN)
    assert isinstance(logits, StepLogits)
    loss = F.cross_entropy(logits.flatten(0, 1), TOKEN.flatten())
    assert type(loss) is type(logits.softmax(-1)) is type(logits.argmax(-1)) is torch.Tensor
    for function in (lambda x: x.topk(3), lambda x: x.max(-1), lambda x: torch.sort(x)):
        values, indices = found = function(logits)
        expected = function(logits.as_subclass(torch.Tensor))
        assert type(found) is type(expected)
        assert type(indices) is torch.Tensor
        assert torch.equal(indices, expected[1])
        assert torch.equal(values, expected[0])
    assert [type(part) for part in logits.split(4, -1)] == [StepLogits, StepLogits]
    loss.backward()
    assert model.head.weight.grad.any()
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    file.seek(0)
    for same in (torch.load(file), copy.deepcopy(logits.detach())):
        assert type(same) is torch.Tensor
        assert torch.equal(same, logits)
    assert type(model(torch.tensor([[3, 4]]))[0]) is torch.Tensor


def test_logits_of_a_step_in_programs_and_transforms():
    torch.compiler.reset()
    model = CharLSTM(7, 5).eval()
    expected, _ = model(TOKEN)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(TOKEN)[0], expected)
    with torch.no_grad():
        program = torch.export.export(model, (TOKEN,))
    torch.testing.assert_close(program.module()(TOKEN)[0], expected.as_subclass(torch.Tensor))
    many = torch.func.vmap(lambda tokens: model(tokens)[0])(TOKEN.expand(3, 1, 1))
    torch.testing.assert_close(many, expected.as_subclass(torch.Tensor).expand(3, 1, 1, 7))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3,), r"unsqueeze\(0\) makes a batch"), ((1, 3, 7), r"vectors\.argmax\(-1\) turns one-hot")],
)
def test_input_of_another_shape_is_told_what_to_do(shape, words):
    with pytest.raises(ValueError, match=words):
        CharLSTM(7, 5)(torch.zeros(shape, dtype=torch.int64))
