"""CharLSTM: shapes, generation, training and checkpoints."""

import math

import pytest
import torch
from torch import nn

import rnnfast
from rnnfast.models import CharLSTM, checkpoint
from rnnfast.models.training import Run, Trainer, TrainingOptions, evaluate
from rnnfast.text import CharVocabulary, TextError, WordVocabulary

TEXT = "the cat sat on the mat; " * 60
VOCABULARY = CharVocabulary(TEXT)
WORDS = WordVocabulary([*VOCABULARY.characters])  # the same number of symbols
QUICK = TrainingOptions(
    seq_length=24, batch_size=8, epochs=30, max_seconds=60, learning_rate=2e-2, clip=1.0
)


def small(**options):
    torch.manual_seed(0)
    options = {"num_layers": 1, "embedding_size": 16, "vocabulary": VOCABULARY, **options}
    return CharLSTM(len(VOCABULARY), 32, **options)


@pytest.fixture(scope="module")
def trained():
    """A model trained on TEXT, and the losses of its training."""
    model = small()
    losses = [step.bits_per_char for step in Run(model, VOCABULARY.encode(TEXT), QUICK)]
    return model, losses


def test_training_learns_a_repeating_text(trained):
    model, losses = trained
    assert losses[0] > 0.8 * math.log2(len(VOCABULARY))
    assert losses[-1] < 0.05
    assert evaluate(model, VOCABULARY.encode(TEXT), 8, 24) < 0.05


def test_a_trained_model_recites_what_it_learnt(trained):
    model, _ = trained
    assert model.generate("the cat ", 48, greedy=True) == TEXT[8:56]


def test_training_is_repeatable():
    options = TrainingOptions(24, 4, epochs=1, max_seconds=60, learning_rate=1e-2, clip=1.0)
    runs = [list(Run(small(dropout=0.2), VOCABULARY.encode(TEXT), options)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_training_ends_when_its_time_is_over():
    options = TrainingOptions(8, 2, epochs=10**6, max_seconds=0.3, learning_rate=1e-2, clip=1.0)
    assert len(list(Run(small(), VOCABULARY.encode(TEXT), options))) > 1


def test_training_stops_at_a_loss_that_is_not_finite():
    model = small()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(ArithmeticError, match="lower learning rate"):
        next(iter(Run(model, VOCABULARY.encode(TEXT), QUICK)))


def test_training_refuses_a_short_text():
    with pytest.raises(TextError, match="too short"):
        Run(small(), VOCABULARY.encode(TEXT[:100]), QUICK)


def test_evaluation_of_an_undecided_model_is_the_size_of_the_vocabulary():
    model = small()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for length in (2, 5, 100):
        bits = evaluate(model, VOCABULARY.encode(TEXT[:length]), 8, 24)
        assert bits == pytest.approx(math.log2(len(VOCABULARY)))
    assert model.training


def test_evaluation_needs_two_characters():
    with pytest.raises(TextError, match="too short"):
        evaluate(small(), VOCABULARY.encode("t"), 8, 24)


def test_forward_equals_the_layers_written_out():
    model = small(num_layers=2, lstm=nn.LSTM)
    tokens = VOCABULARY.encode(TEXT[:10]).view(2, 5)
    logits, (h, c) = model(tokens)
    y, (h_n, c_n) = model.lstm(model.embedding(tokens))
    assert logits.shape == (2, 5, len(VOCABULARY))
    assert h.shape == c.shape == (2, 2, 32)
    assert torch.equal(logits, model.head(y))
    assert torch.equal(h, h_n)
    assert torch.equal(c, c_n)


def test_the_state_carries_the_past():
    model = small(num_layers=2)
    tokens = VOCABULARY.encode(TEXT[:20]).view(2, 10)
    whole, _ = model(tokens, model.init_hidden(2))
    first, state = model(tokens[:, :6])
    second, _ = model(tokens[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_both_classes_of_layers_share_state_dicts_and_results():
    ours, torchs = small(num_layers=2), small(num_layers=2, lstm=nn.LSTM)
    assert isinstance(ours.lstm, rnnfast.LSTM)
    assert isinstance(torchs.lstm, nn.LSTM)
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    tokens = VOCABULARY.encode(TEXT[:30]).view(3, 10)
    torch.testing.assert_close(ours(tokens)[0], torchs(tokens)[0])


def test_the_embedding_is_as_wide_as_the_state_unless_told():
    assert small(embedding_size=None).embedding.weight.shape == (len(VOCABULARY), 32)


def test_forward_needs_batch_and_time():
    with pytest.raises(ValueError, match=r"\(batch, time\), got \(3,\)"):
        small()(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ((0, 4), {}, "vocab_size and embedding_size must be greater than zero, got 0 and 4"),
        ((4, 4), {"embedding_size": 0}, "embedding_size must be greater than zero"),
        ((4, 0), {"embedding_size": 4}, "hidden_size must be greater than zero"),
        ((4, 4, 0), {}, "num_layers must be greater than zero"),
        ((4, 4), {"dropout": 1.5}, "probability"),
        ((4, 4), {"vocabulary": CharVocabulary("abc")}, "vocabulary has 3 symbols"),
    ],
)
def test_impossible_models_are_refused(sizes, options, words):
    with pytest.raises(ValueError, match=words):
        CharLSTM(*sizes, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, WORDS, None])
def test_a_model_survives_its_file(tmp_path, dtype, vocabulary):
    model = small(num_layers=2, dropout=0.25, dtype=dtype, vocabulary=vocabulary)
    checkpoint.save(model, tmp_path / checkpoint.FILE_NAME)
    for path in (tmp_path, tmp_path / checkpoint.FILE_NAME):
        copy = checkpoint.load(path)
        assert copy.config == model.config
        assert copy.vocabulary == model.vocabulary
        assert copy.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value)
        tokens = torch.tensor([[1, 2, 3]])
        assert torch.equal(copy.eval()(tokens)[0], model.eval()(tokens)[0])


def test_a_loaded_model_can_be_trained_further(tmp_path):
    checkpoint.save(small(), tmp_path / "file")
    model = checkpoint.load(tmp_path / "file")
    assert next(iter(Run(model, VOCABULARY.encode(TEXT), QUICK))).bits_per_char > 1


def test_a_step_clips_the_gradient_and_carries_the_state_without_it():
    model = small()
    trainer = Trainer(model, learning_rate=1e-3, clip=0.01)
    tokens = VOCABULARY.encode(TEXT[:50]).view(2, 25)
    step = trainer.step(tokens[:, :-1], tokens[:, 1:])
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert step.characters == 48
    _, state = small()(tokens[:, :-1])
    for carried, expected in zip(trainer.state, state, strict=True):
        assert not carried.requires_grad
        torch.testing.assert_close(carried, expected.detach())


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        checkpoint.save(small(), tmp_path / "missing" / "file")
