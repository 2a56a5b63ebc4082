"""The vocabulary, the corpora, the batches and the bigram baseline."""

import math

import numpy as np
import pytest
import torch

from rnnfast.text import (
    CharVocabulary,
    TextError,
    batches,
    bigram_bits_per_char,
    default_text,
    load_text,
    split,
    streams,
)


@pytest.mark.parametrize("text", ["a", "hello", "\n\t “é” 漢字 🙂", "\ud800 lone surrogate", "\0"])
def test_encoding_is_undone_by_decoding(text):
    vocabulary = CharVocabulary(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert len(vocabulary) == len(set(text))
    for kind in (tokens, tokens.numpy(), tokens.numpy().astype(np.uint8), tokens.tolist()):
        assert vocabulary.decode(kind) == text


def test_tokens_are_numbered_by_code_point():
    vocabulary = CharVocabulary("banana")
    assert vocabulary.encode("banana").tolist() == [1, 0, 2, 0, 2, 0]
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode([]) == ""
    assert "b" in vocabulary
    assert "c" not in vocabulary
    assert "ba" not in vocabulary


@pytest.mark.parametrize("unknown", ["!", "c", "z", "🙂"])
def test_unknown_characters_are_named(unknown):
    with pytest.raises(TextError, match=rf"lacks {unknown!r} \(the first at position 2\)"):
        CharVocabulary("abd").encode(f"ab{unknown}")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([3], "between 0 and 2, got 3"),
        ([0, -1], "between 0 and 2, got -1"),
        (torch.zeros(1, 1, dtype=torch.int64), "one-dimensional"),
        (np.zeros(2), "float64"),
    ],
)
def test_impossible_tokens_are_refused(tokens, words):
    with pytest.raises(TextError, match=words):
        CharVocabulary("abc").decode(tokens)


@pytest.mark.parametrize("characters", ["", [], ["ab"], ["a", ""]])
def test_a_vocabulary_needs_single_characters(characters):
    with pytest.raises(TextError):
        CharVocabulary(characters)


def test_a_vocabulary_survives_its_file(tmp_path):
    vocabulary = CharVocabulary("“naïve”\n漢\ud800")
    vocabulary.save(tmp_path / "vocabulary.json")
    assert CharVocabulary.load(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize("source", ["", "nonsense", "3", '["a"]', '"ba"', '"aab"', '""', "\xff"])
def test_a_foreign_vocabulary_file_is_refused(tmp_path, source):
    (tmp_path / "vocabulary.json").write_bytes(source.encode("latin-1"))
    with pytest.raises(TextError):
        CharVocabulary.load(tmp_path / "vocabulary.json")


def test_the_default_text_is_long_english_prose():
    text = default_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 1000


def test_a_text_file_is_read_as_written(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffone\r\ntwo “é”\n".encode())
    assert load_text(tmp_path / "text") == "one\ntwo “é”\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"\xef\xbb\xbf", "empty"), (b"caf\xe9 au lait", "not UTF-8.*byte 3")],
)
def test_a_useless_text_file_is_refused(tmp_path, content, words):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(TextError, match=words):
        load_text(tmp_path / "text")


def test_a_missing_text_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_text(tmp_path / "missing")


def test_split_cuts_by_position():
    train, validation = split(torch.arange(10), 0.3)
    assert train.tolist() == list(range(7))
    assert validation.tolist() == [7, 8, 9]


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, math.nan])
def test_split_needs_a_fraction(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(torch.arange(10), fraction)


def test_batches_continue_one_another_in_every_stream():
    tokens = torch.arange(24)
    pairs = list(batches(tokens, batch_size=2, seq_length=4))
    assert [inputs.shape for inputs, _ in pairs] == [(2, 4), (2, 4), (2, 3)]
    inputs = torch.cat([inputs for inputs, _ in pairs], 1)
    targets = torch.cat([targets for _, targets in pairs], 1)
    assert inputs.tolist() == [list(range(11)), list(range(11, 22))]
    assert torch.equal(targets, inputs + 1)


def test_the_shortest_possible_text_makes_one_batch():
    inputs, targets = streams(torch.arange(7), batch_size=2, seq_length=3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_text_shorter_than_a_batch_is_refused(length):
    with pytest.raises(TextError, match=f"too short: {length} characters.*need 7"):
        list(batches(torch.arange(length), batch_size=2, seq_length=3))


def test_bigram_of_a_certain_text_costs_almost_nothing():
    tokens = torch.tensor([0, 1] * 500)
    assert 0 < bigram_bits_per_char(tokens, tokens, 2) < 0.01


def test_bigram_of_pure_noise_costs_the_entropy():
    noise = torch.randint(4, (40_000,), generator=torch.Generator().manual_seed(0))
    assert bigram_bits_per_char(noise[:20_000], noise[20_000:], 4) == pytest.approx(2, abs=0.01)


def test_bigram_probabilities_sum_to_one_even_after_an_unseen_character():
    train, size = np.array([0, 1, 0, 2, 0]), 5
    for before in range(size):
        bits = [bigram_bits_per_char(train, np.array([before, b]), size) for b in range(size)]
        assert sum(2.0 ** -np.array(bits)) == pytest.approx(1)


def test_bigram_by_hand():
    # After 0 came 1, 1 and 2: counts 2 and 1, two distinct; P(1) = (2 + 1) / (6 + 3).
    bits = bigram_bits_per_char(np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1]), 3)
    assert 2**-bits == pytest.approx((2 + 2 * 3 / 9) / (3 + 2))


@pytest.mark.parametrize(("train", "validation"), [([0], [0, 1]), ([0, 1], [0]), ([], [])])
def test_bigram_needs_pairs(train, validation):
    with pytest.raises(TextError, match="two characters or more"):
        bigram_bits_per_char(np.array(train, dtype=int), np.array(validation, dtype=int), 2)
