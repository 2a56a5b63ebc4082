"""Seq2SeqLSTM against torch.nn.LSTM step by step, and beam search against exhaustive search."""

import itertools
import math

import pytest
import torch
from torch import nn

from rnnfast.models.beam import beam_search
from rnnfast.models.seq2seq import Seq2SeqLSTM

PAD, START, END = 0, 1, 2
SOURCES = [[3, 1, 4, 1, 5], [2], [6, 5, 3, 5]]
TARGETS = [[4, 3, END], [3, 5, 4, 4, END], [END]]
LENGTHS = [len(source) for source in SOURCES]
SEEDS = [4, 9, 10, 18]  # these seeds give models whose outputs have many lengths
VARIANTS = [
    {},
    {"num_layers": 2},
    {"reverse_source": True},
    {"num_layers": 3, "reverse_source": True, "embedding_size": 7},
]


def small(**options):
    """A model for 7 source and 6 target symbols, with clearly different probabilities."""
    torch.manual_seed(options.pop("seed", 0))
    model = Seq2SeqLSTM(7, options.pop("output_vocab_size", 6), 5, dtype=torch.float64, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def padded(rows, padding=PAD):
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=padding
    )


def layers_in_torch(ours):
    """torch.nn.LSTM with our parameters, one step of one sequence at a time."""
    torchs = nn.LSTM(ours.input_size, ours.hidden_size, ours.num_layers).double()
    weights = dict(ours.named_parameters())

    def step(x, state):
        y, state = torch.func.functional_call(torchs, weights, (x.view(1, 1, -1), state))
        return y.flatten(), state

    return step


def encoded(model, source, state=None):
    """The expected result of `Seq2SeqLSTM.encode` for one sequence without padding."""
    step = layers_in_torch(model.encoder)
    zeros = torch.zeros(model.config.num_layers, 1, 5, dtype=torch.float64)
    state = (zeros, zeros) if state is None else state
    for symbol in reversed(source) if model.config.reverse_source else source:
        _, state = step(model.source_embedding.weight[symbol], state)
    return state


def written(model, source, target, take_truth=lambda t: True, state=None):
    """The expected logits (T, V) of `Seq2SeqLSTM.forward` for one sequence."""
    step, state = layers_in_torch(model.decoder), encoded(model, source, state)
    latest, logits = START, []
    for t, truth in enumerate(target):
        y, state = step(model.target_embedding.weight[latest], state)
        logits.append(model.head.weight @ y + model.head.bias)
        possible = logits[-1].tolist()
        possible[PAD] = possible[START] = -math.inf
        latest = truth if take_truth(t) else possible.index(max(possible))
    return torch.stack(logits)


def assert_same(model, logits, expected):
    """Check that all values outside the padding, and the gradients of all parameters, agree."""
    ours = [row[: len(want)] for row, want in zip(logits, expected, strict=True)]
    gradients = []
    for rows in (ours, expected):
        loss = sum(((k + 1) * row.sin()).sum() for k, row in enumerate(rows))
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    for row, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(row, want, rtol=1e-10, atol=1e-10)
    for gradient, want in zip(*gradients, strict=True):
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_forward_equals_torch_step_by_step(options):
    model = small(**options)
    logits = model(padded(SOURCES), padded(TARGETS), LENGTHS)
    assert logits.shape == (3, 5, 6)
    expected = [written(model, *pair) for pair in zip(SOURCES, TARGETS, strict=True)]
    assert_same(model, logits, expected)


@pytest.mark.parametrize("options", VARIANTS)
def test_sources_of_equal_length_need_no_lengths(options):
    model = small(**options)
    sources, targets = [[3, 1, 4], [2, 6, 5]], [[3, END], [5, END]]
    logits = model(torch.tensor(sources), torch.tensor(targets))
    expected = [written(model, *pair) for pair in zip(sources, targets, strict=True)]
    assert_same(model, logits, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_encoder_starts_from_a_given_state(reverse):
    model = small(num_layers=2, reverse_source=reverse)
    state = tuple(torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in "hc")
    logits = model(padded(SOURCES), padded(TARGETS), LENGTHS, state=state)
    expected = [
        written(model, source, target, state=tuple(part[:, k : k + 1] for part in state))
        for k, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True))
    ]
    assert_same(model, logits, expected)
    ours = torch.autograd.grad(sum(row[0].sum() for row in logits), state)
    theirs = torch.autograd.grad(sum(row[0].sum() for row in expected), state)
    for gradient, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, want)
    # an empty source leaves the state as it was
    lengths = torch.tensor([0, 1, 0])
    h, c = model.encode(padded(SOURCES), lengths, state)
    for part, start in ((h, state[0]), (c, state[1])):
        assert torch.equal(part[:, ::2], start[:, ::2])
        assert not torch.equal(part[:, 1], start[:, 1])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_teacher_forcing_mixes_truth_and_prediction(ratio, given):
    model = small(num_layers=2)
    sources, targets = padded(SOURCES), padded(TARGETS)
    generator = torch.Generator().manual_seed(5) if given else None
    torch.manual_seed(6 if given else 5)
    logits = model(sources, targets, LENGTHS, ratio, generator=generator)
    torch.manual_seed(5)
    chances = torch.rand(targets.shape)
    # all five positions, including the padding after a short target
    expected = [
        written(model, source, target, lambda t, chance=chance: chance[t] < ratio)
        for source, target, chance in zip(SOURCES, targets.tolist(), chances, strict=True)
    ]
    assert_same(model, logits, expected)


def test_the_ratios_of_teacher_forcing_differ():
    model = small()
    run = [
        model(padded(SOURCES), padded(TARGETS), LENGTHS, ratio, generator=generator)
        for ratio in (0.0, 0.5, 1.0)
        for generator in [torch.Generator().manual_seed(1)]
    ]
    torch.testing.assert_close(run[0][:, 0], run[2][:, 0])
    for one, other in itertools.combinations(run, 2):
        assert (one - other).abs().max() > 0.1


def test_its_own_predictions_need_no_truth():
    model = small()
    other = torch.full((3, 5), END)
    free = model(padded(SOURCES), padded(TARGETS), LENGTHS, 0)
    assert torch.equal(model(padded(SOURCES), other, LENGTHS, 0.0), free)


@pytest.mark.parametrize("padding", [1, 6, -100, 10**6])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_stands_beyond_a_source_does_not_matter(padding, reverse):
    model = small(num_layers=2, reverse_source=reverse)
    targets = padded(TARGETS)
    results = []
    for sources in (padded(SOURCES), padded([*SOURCES, [0] * 9], padding)[:3]):
        logits = model(sources, targets, torch.tensor(LENGTHS))
        gradients = torch.autograd.grad(model.loss(logits, targets), list(model.parameters()))
        results.append((logits, *gradients, *model.decode(sources, LENGTHS, max_length=6)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    without = model(padded(SOURCES), targets)
    assert (without - results[0][0]).abs().max() > 0.1


def test_the_loss_is_the_mean_over_true_symbols():
    model = small()
    targets = padded(TARGETS)
    logits = model(padded(SOURCES), targets, LENGTHS)
    terms = [
        -logits[b, t].softmax(0)[symbol].log()
        for b, target in enumerate(TARGETS)
        for t, symbol in enumerate(target)
    ]
    expected = sum(terms) / 9
    loss = model.loss(logits, targets)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(loss, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for gradient, want in pairs:
        torch.testing.assert_close(gradient, want)
    longer = nn.functional.pad(targets, (0, 3), value=PAD)
    torch.testing.assert_close(model.loss(model(padded(SOURCES), longer, LENGTHS), longer), loss)


def test_the_loss_ignores_the_padding_symbol_of_the_model():
    model = small(padding_token=5, start_token=0, end_token=1)
    targets = padded([[2, 3, 1], [1]], 5)
    logits = model(torch.tensor([[1, 2], [3, 4]]), targets)
    expected = nn.functional.cross_entropy(logits[targets != 5], targets[targets != 5])
    torch.testing.assert_close(model.loss(logits, targets), expected)


def log_probability(model, source, target):
    """The log-probability of a target, including its end symbol if it has one."""
    scores = written(model, source, target).log_softmax(1)
    return scores[range(len(target)), target].sum().item()


def greedy(model, source, max_length):
    """The symbols of greedy search, the end symbol included if it comes in time."""
    chosen = []
    while len(chosen) < max_length and (not chosen or chosen[-1] != END):
        scores = written(model, source, [*chosen, END])[-1].tolist()
        scores[PAD] = scores[START] = -math.inf
        chosen.append(scores.index(max(scores)))
    return chosen


def search(model, source, beam_size, max_length, penalty):
    """Beam search over one sequence with lists, as `beam_search` describes it."""
    beam, complete = [([], 0.0)], []
    for _ in range(max_length):
        candidates = []
        for symbols, score in beam:
            scores = written(model, source, [*symbols, END])[-1].log_softmax(0).tolist()
            candidates += [
                ([*symbols, symbol], score + scores[symbol])
                for symbol in range(len(scores))
                if symbol not in (PAD, START)
            ]
        candidates = sorted(candidates, key=lambda each: -each[1])[:beam_size]
        complete += [each for each in candidates if each[0][-1] == END]
        beam = [each for each in candidates if each[0][-1] != END]
    if not complete:
        return beam[0]
    return max(complete, key=lambda each: each[1] / ((5 + len(each[0])) / 6) ** penalty)


def assert_decoded(decoded, expected, max_length):
    """Compare with `expected`: symbols, including the end symbol, and log-probabilities."""
    for row, (symbols, score) in enumerate(expected):
        content = [symbol for symbol in symbols if symbol != END]
        length = int(decoded.lengths[row])
        assert decoded.tokens[row, :length].tolist() == content
        assert (decoded.tokens[row, length:] == PAD).all()
        assert (length == max_length) == (END not in symbols)
        assert decoded.scores[row].item() == pytest.approx(score, abs=1e-9)
    assert decoded.tokens.size(1) == decoded.lengths.max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", VARIANTS)
def test_a_beam_of_one_is_greedy_search(seed, options):
    model = small(seed=seed, **options)
    chosen = [greedy(model, source, 6) for source in SOURCES]
    expected = [
        (each, log_probability(model, source, each))
        for source, each in zip(SOURCES, chosen, strict=True)
    ]
    assert_decoded(model.decode(padded(SOURCES), LENGTHS, max_length=6), expected, 6)


def test_sequences_end_early_late_and_never():
    lengths = {len(greedy(small(seed=seed), source, 6)) for seed in SEEDS for source in SOURCES}
    assert lengths == {1, 2, 3, 4, 6}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_beam_search_equals_the_same_with_lists(seed, penalty, beam_size):
    model = small(seed=seed)
    expected = [search(model, source, beam_size, 5, penalty) for source in SOURCES]
    decoded = model.decode(
        padded(SOURCES), LENGTHS, max_length=5, beam_size=beam_size, length_penalty=penalty
    )
    assert_decoded(decoded, expected, 5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_beam_as_wide_as_all_hypotheses_finds_the_best(seed, penalty):
    model, max_length = small(seed=seed, output_vocab_size=5), 4
    every = [
        [*symbols, END]
        for length in range(max_length)
        for symbols in itertools.product((3, 4), repeat=length)
    ]
    expected = []
    for source in SOURCES:
        scored = [(each, log_probability(model, source, each)) for each in every]
        expected.append(max(scored, key=lambda each: each[1] / ((5 + len(each[0])) / 6) ** penalty))
    decoded = model.decode(
        padded(SOURCES), LENGTHS, max_length=max_length, beam_size=30, length_penalty=penalty
    )
    assert_decoded(decoded, expected, max_length)


def test_a_wider_beam_finds_what_greedy_search_misses():
    better = 0
    for seed in range(12):
        model = small(seed=seed)
        options = {"max_length": 5, "source_lengths": LENGTHS}
        narrow = model.decode(padded(SOURCES), **options)
        wide = model.decode(padded(SOURCES), **options, beam_size=200)
        ended = narrow.lengths < 5
        assert (wide.scores[ended] >= narrow.scores[ended] - 1e-12).all()
        better += int((wide.scores[ended] > narrow.scores[ended] + 1e-3).sum())
    assert better > 0


def chain(table):
    """A decoder with a table: the probabilities of the next symbol after each prefix."""

    def step(latest, state):
        (past,) = state
        calls.append(len(latest))
        past = torch.cat([past, latest.to(past.dtype).view(1, -1, 1)], 2)
        odds = [table.get(tuple(row[1:]), table[None]) for row in past[0].long().tolist()]
        return torch.tensor(odds, dtype=past.dtype).log(), (past,)

    calls = []
    return step, calls


def search_chain(table, **options):
    step, calls = chain(table)
    options = {"beam_size": 2, "max_length": 4, "length_penalty": 0.0, **options}
    state = (torch.zeros(1, options.pop("batch", 1), 0, dtype=torch.float64),)
    symbols = {"start_token": START, "end_token": END, "padding_token": PAD}
    return beam_search(step, state, **symbols, **options), calls


MISLEADING = {  # 3 looks better than 4 at first, and ends badly
    (): [0, 0, 0, 0.6, 0.4],
    (3,): [0, 0, 0.3, 0.35, 0.35],
    (4,): [0, 0, 0.9, 0.1, 0.0],
    None: [0, 0, 0.5, 0.25, 0.25],
}
BRIEF = {  # the empty output is the likeliest, but the end is not the likeliest symbol
    (): [0, 0, 0.3, 0.4, 0.3],
    (3,): [0, 0, 0.4, 0.3, 0.3],
    None: [0, 0, 0.5, 0.25, 0.25],
}
ENDLESS = {None: [0, 0, 0, 0.7, 0.3]}
EVEN = {None: [0, 0, 0.25, 0.25, 0.5], (4, 4, 4): [0, 0, 0.25, 0.5, 0.25]}


@pytest.mark.parametrize(
    ("table", "options", "symbols", "probability", "calls"),
    [
        (MISLEADING, {"beam_size": 1}, [3, 3], 0.6 * 0.35 * 0.5, 3),
        (MISLEADING, {}, [4], 0.4 * 0.9, 2),
        (BRIEF, {"beam_size": 1}, [3], 0.4 * 0.4, 2),
        (BRIEF, {"beam_size": 3}, [], 0.3, 2),  # 0.3 cannot be beaten by 0.4 * 0.3
        (BRIEF, {"beam_size": 3, "length_penalty": 4.0}, [3, 3, 3], 0.4 * 0.3 * 0.25 * 0.5, 4),
        (ENDLESS, {}, [3, 3, 3, 3], 0.7**4, 4),
        (ENDLESS, {"max_length": 1}, [3], 0.7, 1),
        (EVEN, {"beam_size": 1}, [4, 4, 4, 3], 0.5**4, 4),
        (EVEN, {"beam_size": 2}, [], 0.25, 2),
    ],
)
def test_beam_search_over_known_odds(table, options, symbols, probability, calls):
    for batch in (1, 3):
        found, called = search_chain(table, **options, batch=batch)
        assert found.tokens.tolist() == [symbols] * batch
        assert found.lengths.tolist() == [len(symbols)] * batch
        assert found.scores.exp().tolist() == pytest.approx([probability] * batch)
        assert called == [batch * options.get("beam_size", 2)] * calls


def test_equal_candidates_rank_by_hypothesis_and_symbol():
    even = {None: [0, 0, 0, 0.25, 0.25, 0.25, 0.25]}
    for beam_size in (1, 2, 5):
        found, _ = search_chain(even, beam_size=beam_size)
        assert found.tokens.tolist() == [[3, 3, 3, 3]]


def test_decoding_a_batch_is_decoding_its_rows():
    model = small(num_layers=2)
    options = {"max_length": 6, "beam_size": 3}
    together = model.decode(padded(SOURCES), LENGTHS, **options)
    for row, source in enumerate(SOURCES):
        alone = model.decode(torch.tensor([source]), **options)
        length = int(alone.lengths)
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert together.lengths[row] == length
        torch.testing.assert_close(together.scores[row], alone.scores[0])
    again = model.decode(padded(SOURCES), LENGTHS, **options)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one, other)


def test_decoding_starts_the_encoder_from_a_given_state():
    model = small()
    state = model.encode(torch.tensor([[3, 1]]))
    whole = model.decode(torch.tensor([[3, 1, 4, 5]]), max_length=6, beam_size=2)
    rest = model.decode(torch.tensor([[4, 5]]), max_length=6, beam_size=2, state=state)
    assert torch.equal(rest.tokens, whole.tokens)
    torch.testing.assert_close(rest.scores, whole.scores)


def test_padding_and_start_are_never_written():
    model = small()
    with torch.no_grad():
        model.head.bias[[PAD, START]] = 50.0
    for beam_size in (1, 4):
        written = model.decode(padded(SOURCES), LENGTHS, max_length=6, beam_size=beam_size)
        for row, length in zip(written.tokens, written.lengths, strict=True):
            assert (row[:length] > END).all()
        assert (written.scores < -40).all()
        assert (written.scores > -math.inf).all()


@pytest.mark.parametrize("training", [True, False])
def test_decoding_restores_the_mode_and_ignores_dropout(training):
    model = small(num_layers=2, dropout=0.5).train(training)
    runs = [model.decode(padded(SOURCES), LENGTHS, max_length=6) for _ in range(2)]
    assert torch.equal(runs[0].scores, runs[1].scores)
    assert not runs[0].scores.requires_grad
    assert model.training is model.encoder.training is training
    with pytest.raises(ValueError, match="beam_size"):
        model.decode(padded(SOURCES), max_length=6, beam_size=0)
    assert model.training is training


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    inputs = padded(SOURCES), padded(TARGETS), LENGTHS
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_what_was_decoded_can_be_trained_on():
    model = small()
    decoded = model.decode(padded(SOURCES), LENGTHS, max_length=6)
    model.loss(model(padded(SOURCES), decoded.tokens, LENGTHS), decoded.tokens).backward()
    assert model.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_at_least_float32(dtype):
    model = small().to(dtype)
    decoded = model.decode(padded(SOURCES), LENGTHS, max_length=6, beam_size=2)
    assert decoded.scores.dtype == torch.float32
    expected = small().decode(padded(SOURCES), LENGTHS, max_length=6, beam_size=2)
    torch.testing.assert_close(decoded.scores.double(), expected.scores, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_backends_agree(backend):
    ours, theirs = small(num_layers=2), small(num_layers=2, backend=backend)
    inputs = padded(SOURCES), padded(TARGETS), LENGTHS
    torch.testing.assert_close(theirs(*inputs), ours(*inputs))


def test_an_empty_batch_stays_empty():
    model = small()
    sources, targets = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)
    assert model(sources, targets).shape == (0, 3, 6)
    decoded = model.decode(sources, max_length=6, beam_size=2)
    assert decoded.tokens.shape == (0, 0)
    assert decoded.scores.shape == decoded.lengths.shape == (0,)


def test_the_config_makes_the_same_model():
    model = small(num_layers=2, embedding_size=3, dropout=0.25, reverse_source=True)
    copy = Seq2SeqLSTM(**model.config._asdict(), dtype=torch.float64)
    assert copy.config == model.config
    copy.load_state_dict(model.state_dict())
    inputs = padded(SOURCES), padded(TARGETS), LENGTHS
    assert torch.equal(copy.eval()(*inputs), model.eval()(*inputs))
    assert Seq2SeqLSTM(4, 5, 6).source_embedding.weight.shape == (4, 6)


def reversal(count, generator):
    """Sources of 1 to 5 symbols, their lengths, and their targets: the same symbols backwards."""
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    sources = [torch.randint(3, 8, (length,), generator=generator).tolist() for length in lengths]
    return padded(sources), lengths, padded([[*source[::-1], END] for source in sources])


def test_it_learns_to_reverse():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Seq2SeqLSTM(8, 8, 48, embedding_size=16)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(500):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 500)
        sources, lengths, targets = reversal(64, generator)
        loss = model.loss(model(sources, targets, lengths), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    sources, lengths, targets = reversal(200, generator)
    for beam_size in (1, 3):
        decoded = model.decode(sources, lengths, max_length=6, beam_size=beam_size)
        wanted = targets.masked_fill(targets == END, PAD)[:, : decoded.tokens.size(1)]
        right = (decoded.tokens == wanted).all(1) & (decoded.lengths == torch.tensor(lengths))
        assert right.double().mean() > 0.95


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((0, 5, 4), {}, "greater than zero, got 0 and 4"),
        ((4, 5, 4), {"embedding_size": 0}, "greater than zero, got 4 and 0"),
        ((4, 5, 0), {"embedding_size": 4}, "hidden_size must be greater than zero"),
        ((4, 5, 4), {"num_layers": 0}, "num_layers must be greater than zero"),
        ((4, 5, 4), {"dropout": 1.5}, "probability"),
        ((4, 2, 4), {}, "distinct and from 0 to 1, got 0, 1 and 2"),
        ((4, 5, 4), {"end_token": 1}, "distinct and from 0 to 4, got 0, 1 and 1"),
        ((4, 5, 4), {"padding_token": -1}, "distinct and from 0 to 4, got -1, 1 and 2"),
        ((4, 5, 4), {"backend": "warp"}, "warp"),
    ],
)
def test_impossible_models_are_refused(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        Seq2SeqLSTM(*sizes, **options)


TWO = torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("source", "target", "options", "error", "words"),
    [
        (TWO[0, 0], TWO, {}, ValueError, r"sources of shape \(\), got \(2, 2\)"),
        (TWO[0], TWO, {}, ValueError, r"sources of shape \(batch, time\), got \(2,\)"),
        (TWO, TWO[0], {}, ValueError, r"targets of shape .* sources of shape \(2, 2\), got \(2,\)"),
        (TWO, TWO[:1], {}, ValueError, r"sources of shape \(2, 2\), got \(1, 2\)"),
        (TWO, TWO[:, :0], {}, ValueError, r"one step or more, .* got \(2, 0\)"),
        (TWO[:, :0], TWO, {}, RuntimeError, "sequence length to be larger than 0"),
        (TWO, TWO, {"teacher_forcing_ratio": 1.1}, ValueError, "from 0 to 1, got 1.1"),
        (TWO, TWO, {"teacher_forcing_ratio": math.nan}, ValueError, "from 0 to 1, got nan"),
        (TWO, TWO, {"source_lengths": [2]}, RuntimeError, r"lengths of shape \(2,\), got \[1\]"),
        (TWO, TWO, {"source_lengths": [2, 3]}, ValueError, "between 0 and 2, got 3"),
        (TWO, TWO, {"source_lengths": [2, -1]}, ValueError, "between 0 and 2, got -1"),
        (TWO, TWO, {"source_lengths": [1.0, 2.0]}, TypeError, "lengths should be integers"),
        (TWO, TWO, {"state": (torch.zeros(1, 1, 5),) * 2}, RuntimeError, "hidden"),
        (TWO + 4, TWO, {}, IndexError, "index out of range"),
        (TWO, TWO + 4, {}, IndexError, "index out of range"),
        (TWO.double(), TWO, {}, TypeError, "tokens to be integers"),
    ],
)
def test_forward_refuses_impossible_requests(source, target, options, error, words):
    with pytest.raises(error, match=words):
        small()(source, target, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beam_size": 0}, "beam_size must be 1 or more, got 0"),
        ({"max_length": 0}, "max_length must be 1 or more, got 0"),
        ({"length_penalty": -0.1}, "length_penalty must be finite and not negative, got -0.1"),
        ({"length_penalty": math.nan}, "length_penalty must be finite and not negative, got nan"),
        ({"length_penalty": math.inf}, "length_penalty must be finite and not negative, got inf"),
        ({"source_lengths": [2, 3]}, "between 0 and 2, got 3"),
        ({"source": TWO[0]}, r"\(batch, time\), got \(2,\)"),
    ],
)
def test_decoding_refuses_impossible_requests(options, words):
    with pytest.raises(ValueError, match=words):
        small().decode(**{"source": TWO, "max_length": 5, **options})
