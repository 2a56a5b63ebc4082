"""SimpleRNN, ElmanRNN and JordanRNN: their formulas step by step, and training."""

import pytest
import torch
from torch import nn

from rnnfast.models.elman import ElmanRNN
from rnnfast.models.jordan import JordanRNN
from rnnfast.models.simple_rnn import SimpleRNN

MODELS = [SimpleRNN, ElmanRNN, JordanRNN]
ALPHABET = "helo"
SIZES = [(3, 5, 2), (2, 3, 6), (4, 4, 4), (1, 1, 1)]


def build(kind, input_size=3, hidden_size=5, output_size=2, **options):
    torch.manual_seed(0)
    return kind(input_size, hidden_size, output_size, **{"dtype": torch.float64, **options})


def simple_steps(model, x, h):
    outputs = []
    for x_t in x.unbind(1):
        both = torch.cat([x_t, h], 1)
        outputs.append(torch.log_softmax(both @ model.i2o.weight.T + model.i2o.bias, 1))
        h = torch.tanh(both @ model.i2h.weight.T + model.i2h.bias)
    return torch.stack(outputs, 1), h


def elman_steps(model, x, h):
    outputs, rnn = [], model.rnn
    for x_t in x.unbind(1):
        from_input = x_t @ rnn.weight_ih_l0.T + rnn.bias_ih_l0
        h = torch.tanh(from_input + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        outputs.append(h @ model.fc.weight.T + model.fc.bias)
    return torch.stack(outputs, 1), h


def jordan_steps(model, x, y):
    outputs = []
    for x_t in x.unbind(1):
        h = torch.tanh(x_t @ model.i2h.weight.T + y @ model.o2h.weight.T + model.i2h.bias)
        y = h @ model.h2o.weight.T + model.h2o.bias
        outputs.append(y)
    return torch.stack(outputs, 1), y


STEPS = {SimpleRNN: simple_steps, ElmanRNN: elman_steps, JordanRNN: jordan_steps}


def results_and_gradients(model, run, x, state):
    """The results of `run`, and the gradients of x, the state and all parameters."""
    x, state = x.clone().requires_grad_(), state.clone().requires_grad_()
    output, final = run(x, state)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    loss = (output * weight).sum() + final.square().sum()
    return output, final, *torch.autograd.grad(loss, [x, state, *model.parameters()])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sequence_is_the_formula_step_by_step(kind, sizes, steps):
    model = build(kind, *sizes)
    x = torch.randn(4, steps, sizes[0], dtype=torch.float64)
    state = torch.randn_like(model.init_hidden(4))
    actual = results_and_gradients(model, model, x, state)
    expected = results_and_gradients(model, lambda x, s: STEPS[kind](model, x, s), x, state)
    assert actual[0].shape == (4, steps, sizes[2])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert all(gradient.abs().max() > 0 for gradient in expected[2:] if sizes[2] > 1)


@pytest.mark.parametrize("kind", MODELS)
def test_a_single_step_is_a_sequence_of_one(kind):
    model = build(kind)
    x, state = torch.randn(4, 6, 3, dtype=torch.float64), None
    outputs = []
    for x_t in x.unbind(1):
        output, state = model(x_t, state)
        assert output.shape == (4, 2)
        outputs.append(output)
    whole, final = model(x)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_gradcheck(kind):
    model = build(kind, 2, 3, 2)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(x, state, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, given, (x, state), {"lengths": [3, 1, 0]})

    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn_like(model.init_hidden(3)).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, state, *parameters))


def test_the_states_are_what_a_step_hands_on():
    assert build(SimpleRNN).init_hidden(4).shape == (4, 5)
    assert build(ElmanRNN).init_hidden(4).shape == (4, 5)
    assert build(JordanRNN).init_hidden(4).shape == (4, 2)
    for kind in MODELS:
        assert not build(kind).init_hidden(4).any()


def test_jordan_hands_on_its_output():
    output, final = build(JordanRNN)(torch.randn(4, 6, 3, dtype=torch.float64))
    assert torch.equal(final, output[:, -1])


def test_simple_rnn_gives_probabilities_that_do_not_see_the_new_state():
    model = build(SimpleRNN)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    output, _ = model(x)
    torch.testing.assert_close(output.exp().sum(2), torch.ones(4, 6, dtype=torch.float64))
    nn.init.zeros_(model.i2h.weight)  # the state is a constant from the first step on
    nn.init.ones_(model.i2h.bias)
    output, hidden = model(x)
    constant = torch.full((4, 5), torch.tanh(torch.tensor(1.0)).item(), dtype=torch.float64)
    torch.testing.assert_close(hidden, constant, rtol=0, atol=1e-7)
    first = model.i2o(torch.cat([x[:, 0], torch.zeros(4, 5, dtype=torch.float64)], 1))
    torch.testing.assert_close(output[:, 0], first.log_softmax(1))


class Tutorial(nn.Module):
    """The network as tutorials write it."""

    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.i2h = nn.Linear(input_size + hidden_size, hidden_size)
        self.i2o = nn.Linear(input_size + hidden_size, output_size)
        self.softmax = nn.LogSoftmax(dim=1)

    def forward(self, input, hidden):
        combined = torch.cat((input, hidden), 1)
        hidden = torch.tanh(self.i2h(combined))
        return self.softmax(self.i2o(combined)), hidden


def test_a_state_dict_of_the_tutorials_loads_and_gives_the_same():
    theirs, ours = Tutorial(3, 5, 2), build(SimpleRNN, dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x, hidden = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(ours(x, hidden), theirs(x, hidden))


def one_hot(text):
    return nn.functional.one_hot(torch.tensor([ALPHABET.index(c) for c in text]), 4).float()


def test_simple_rnn_learns_to_say_hello():
    model = build(SimpleRNN, 4, 12, 4, dtype=torch.float32)
    x, target = one_hot("hell").unsqueeze(0), one_hot("ello").argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(100):
        optimiser.zero_grad()
        output, _ = model(x)
        nn.functional.nll_loss(output[0], target).backward()
        optimiser.step()
    spoken, hidden = "", model.init_hidden(1)
    for character in "hell":
        output, hidden = model(one_hot(character), hidden)
        spoken += ALPHABET[output.argmax(1).item()]
    assert spoken == "ello"
    assert "".join(ALPHABET[i] for i in model(x)[0][0].argmax(1)) == "ello"
    assert model(x)[0][0].exp().gather(1, target.unsqueeze(1)).min() > 0.9


def test_simple_rnn_learns_step_by_step_what_it_learns_from_the_sequence():
    x, target = one_hot("hell").unsqueeze(0), one_hot("ello").argmax(1)
    stepwise = build(SimpleRNN, 4, 12, 4, dtype=torch.float32)
    whole = build(SimpleRNN, 4, 12, 4, dtype=torch.float32)
    for _ in range(20):
        for model in (stepwise, whole):
            model.zero_grad()
            hidden, loss = model.init_hidden(1), torch.zeros(())
            if model is whole:
                loss = nn.functional.nll_loss(model(x)[0][0], target, reduction="sum")
            else:
                for t in range(4):
                    output, hidden = model(x[:, t], hidden)
                    loss = loss + nn.functional.nll_loss(output, target[t : t + 1])
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    for a, b in zip(stepwise.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole.i2h.weight, build(SimpleRNN, 4, 12, 4).i2h.weight.float())


def test_elman_learns_to_remember_the_step_before():
    model = build(ElmanRNN, 2, 16, 2, dtype=torch.float32)
    bits = torch.randint(2, (32, 12))
    x, target = nn.functional.one_hot(bits, 2).float(), bits.roll(1, 1)[:, 1:]
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimiser.zero_grad()
        output, _ = model(x)
        nn.functional.cross_entropy(output[:, 1:].flatten(0, 1), target.flatten()).backward()
        optimiser.step()
    fresh = torch.randint(2, (100, 12))
    output, _ = model(nn.functional.one_hot(fresh, 2).float())
    assert torch.equal(output[:, 1:].argmax(2), fresh[:, :-1])


def test_jordan_learns_a_running_sum():
    """y_t = y_{t-1} + x_t needs no memory except the previous output."""
    model = build(JordanRNN, 1, 16, 1, dtype=torch.float32)
    x = 0.3 * torch.randn(64, 10, 1)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(400):
        optimiser.zero_grad()
        loss = (model(x)[0] - x.cumsum(1)).square().mean()
        loss.backward()
        optimiser.step()
    fresh = 0.3 * torch.randn(100, 10, 1)
    error = (model(fresh)[0] - fresh.cumsum(1)).square().mean()
    assert error < 0.02 * fresh.cumsum(1).var()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("x", "state", "options", "error", "words"),
    [
        ((3,), None, {}, ValueError, r"or \(batch, time, features\), got \(3,\)"),
        ((4, 5, 2), None, {}, RuntimeError, "Expected 3, got 2"),
        ((4, 2), None, {}, RuntimeError, "Expected 3, got 2"),
        ((4, 0, 3), None, {}, RuntimeError, "sequence length to be larger than 0"),
        ((4, 5, 3), (1, 4), {}, RuntimeError, r"Expected \w+ size \(4, [25]\), got"),
        ((4, 5, 3), (4, 1), {}, RuntimeError, r"got \[4, 1\]"),
        ((4, 3), (1, 1), {}, RuntimeError, r"got \[1, 1\]"),
        ((4, 5, 3), None, {"lengths": [1, 2, 3]}, RuntimeError, r"lengths of shape \(4,\)"),
        ((4, 5, 3), None, {"lengths": [1, 2, 3, 6]}, ValueError, "between 0 and 5, got 6"),
        ((4, 5, 3), None, {"lengths": [1, 2, 3, -1]}, ValueError, "between 0 and 5, got -1"),
        ((4, 5, 3), None, {"lengths": [1.0, 2, 3, 4]}, TypeError, "lengths should be integers"),
    ],
)
def test_what_does_not_fit_is_refused(kind, x, state, options, error, words):
    x = torch.zeros(x, dtype=torch.float64)
    state = None if state is None else torch.zeros(state, dtype=torch.float64)
    with pytest.raises(error, match=words):
        build(kind)(x, state, **options)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((0, 1, 1), {}, "input_size must be greater than zero, got 0"),
        ((1, -1, 1), {}, "hidden_size must be greater than zero, got -1"),
        ((1, 1, 0), {}, "output_size must be greater than zero, got 0"),
        ((1, 1, 1), {"backend": "fast"}, "backend should be one of .* 'fast'"),
    ],
)
def test_impossible_networks_are_refused(kind, sizes, options, words):
    with pytest.raises(ValueError, match=words):
        kind(*sizes, **options)
