"""The vocabularies, the corpora, the batches and the bigram baseline."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnnfast.text import (
    CharVocabulary,
    TextError,
    Vocabulary,
    WordVocabulary,
    batches,
    bigram_bits_per_char,
    default_text,
    load_text,
    split,
    split_words,
    streams,
)

SPECIAL = {"unknown": "<unk>", "padding": "<pad>", "special": ("<s>", "</s>")}
PROSE = "the cat sees the dog; the dog, it seems, doesn't see the cat."
VOCABULARIES = [
    CharVocabulary(PROSE),
    CharVocabulary("“naïve”\n漢\ud800"),
    CharVocabulary("\ud83d\ude42"),  # two lone surrogates, which must not become an emoji
    CharVocabulary(PROSE, **SPECIAL),
    WordVocabulary(PROSE),
    WordVocabulary(PROSE, max_size=7, **SPECIAL),
    WordVocabulary(["New York", "naïve", "漢"], unknown="?"),
]


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t ", []),
        ("Stop!! Now...", ["Stop", "!", "!", "Now", ".", ".", "."]),
        ("don't, it’s O'Neil's", ["don't", ",", "it’s", "O'Neil's"]),  # noqa: RUF001
        ("'quoted' rock 'n' roll", ["'", "quoted", "'", "rock", "'", "n", "'", "roll"]),
        ("x_1=2.5 a-b", ["x_1", "=", "2", ".", "5", "a", "-", "b"]),
        ("Ärger 漢字🙂", ["Ärger", "漢字", "🙂"]),
    ],
)
def test_words_and_punctuation_are_split(text, words):
    assert split_words(text) == words


@given(st.text())
def test_a_decoded_text_has_the_same_words(text):
    words = split_words(text)
    assert "".join(words) == "".join(text.split())
    if words:
        vocabulary = WordVocabulary(text)
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == " ".join(words)
        assert torch.equal(vocabulary.encode(vocabulary.decode(tokens)), tokens)


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        ("b a b c a b", {}, ("b", "a", "c")),
        ("z y z y x", {}, ("z", "y", "x")),  # equally frequent words are in order of occurrence
        ({"z", "y", "x"}, {}, ("x", "y", "z")),
        (["a b", "c", "c"], {}, ("c", "a b")),
        ("a b b c c c", {"min_count": 2}, ("c", "b")),
        ("a b b c c c", {"max_size": 2}, ("c", "b")),
        ("a b b c c c", {"max_size": 2, "unknown": "<unk>"}, ("c",)),
        (["<unk>", "a", "<unk>"], {"max_size": 2, "unknown": "<unk>"}, ("a",)),
    ],
)
def test_words_are_numbered_by_frequency(words, options, expected):
    vocabulary = WordVocabulary(words, **options)
    assert vocabulary.words == expected
    assert vocabulary.symbols[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        ("", {}, TextError, "at least one word, got none"),
        ("a b", {"min_count": 2}, TextError, "at least one word"),
        ("a b", {"max_size": 1, "unknown": "?", "padding": "_"}, TextError, "at least one word"),
        (["a", ""], {}, TextError, "an empty one"),
        ("a", {"min_count": 0}, ValueError, "min_count must be a positive integer, got 0"),
        ("a", {"max_size": 1.5}, ValueError, "max_size must be a positive integer, got 1.5"),
        (["a", 3], {}, TypeError, "expected strings, got 3"),
        (3, {}, TypeError, "expected an iterable of strings, got 3"),
        ("a", {"unknown": 3}, TypeError, "expected strings, got 3"),
        ("a", {"special": "<s>"}, TypeError, "expected an iterable of strings, got '<s>'"),
        ("a", {"unknown": "?", "padding": "?"}, TextError, "distinct and not empty"),
        ("a", {"padding": ""}, TextError, "distinct and not empty"),
    ],
)
def test_impossible_word_vocabularies_are_refused(words, options, error, message):
    with pytest.raises(error, match=message):
        WordVocabulary(words, **options)


@pytest.mark.parametrize("kind", [CharVocabulary, WordVocabulary])
def test_special_symbols_come_first(kind):
    vocabulary = kind("b a a", **SPECIAL)
    assert vocabulary.symbols[:4] == ("<pad>", "<unk>", "<s>", "</s>")
    assert [vocabulary.token(symbol) for symbol in vocabulary.symbols] == [*range(len(vocabulary))]
    assert all(symbol in vocabulary for symbol in vocabulary.symbols)
    with pytest.raises(TextError, match=f"of {len(vocabulary)} lacks 'c'"):
        vocabulary.token("c")


@pytest.mark.parametrize(
    ("vocabulary", "text", "items", "decoded"),
    [
        (CharVocabulary("ab", **SPECIAL), "abc", ["a", "b", "<unk>"], "ab<unk>"),
        (CharVocabulary("ab", unknown="b"), "abc", ["a", "b", "b"], "abb"),
        (WordVocabulary("a b!", **SPECIAL), "b c!", ["b", "<unk>", "!"], "b <unk> !"),
    ],
)
def test_unknown_items_become_the_unknown_symbol(vocabulary, text, items, decoded):
    tokens = vocabulary.encode(text)
    assert tokens.tolist() == [vocabulary.token(item) for item in items]
    assert vocabulary.decode(tokens) == decoded


def test_unknown_words_are_named_without_an_unknown_symbol():
    with pytest.raises(
        TextError, match=r"unknown words: .* of 2 lacks 'b', 'c' \(the first at .* 1"
    ):
        WordVocabulary("a d").encode("a c b c")


@pytest.mark.parametrize(
    ("vocabulary", "text", "joined"),
    [
        (CharVocabulary("hole", **SPECIAL), list("hello"), "hello"),
        (WordVocabulary(PROSE, **SPECIAL), split_words(PROSE), " ".join(split_words(PROSE))),
    ],
)
def test_symbols_are_encoded_one_by_one_and_left_out_again(vocabulary, text, joined):
    tokens = vocabulary.encode(["<s>", *text, "</s>", "<pad>", "<unk>"])
    assert [tokens[0], *tokens[-3:]] == [2, 3, 0, 1]
    assert vocabulary.decode(tokens, skip_special=True) == joined
    assert vocabulary.decode(tokens).startswith("<s>")


@pytest.mark.parametrize("items", [3, None, b"abc", ["a", 1]])
def test_only_strings_are_encoded(items):
    with pytest.raises(TypeError, match=r"expected .*strings"):
        CharVocabulary("abc", unknown="?").encode(items)


def test_sequences_are_padded_to_the_longest():
    vocabulary = CharVocabulary("abc", unknown="<unk>", padding="<pad>")
    sequences = [vocabulary.encode("ab"), np.array([4, 4, 1], np.uint8), [3], []]
    tokens, lengths = vocabulary.pad(sequences)
    assert tokens.tolist() == [[2, 3, 0], [4, 4, 1], [3, 0, 0], [0, 0, 0]]
    assert lengths.tolist() == [2, 3, 1, 0]
    assert tokens.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "sequences", "message"),
    [
        ({}, [[0]], "no padding symbol"),
        (SPECIAL, [], "at least one sequence"),
        (SPECIAL, [[0], [9]], "between 0 and 6, got 9"),
        (SPECIAL, [[[0]]], r"one-dimensional tokens, got tokens of shape \(1, 1\)"),
        (SPECIAL, [[0.5]], "integer tokens, got float64"),
        (SPECIAL, ["ab"], "integer tokens, got <U1"),
    ],
)
def test_impossible_padding_is_refused(options, sequences, message):
    with pytest.raises(TextError, match=message):
        CharVocabulary("abc", **options).pad(sequences)


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=repr)
def test_a_vocabulary_survives_its_file_and_its_state(tmp_path, vocabulary):
    vocabulary.save(tmp_path / "vocabulary.json")
    restored = [
        Vocabulary.load(tmp_path / "vocabulary.json"),
        type(vocabulary).load(tmp_path / "vocabulary.json"),
        Vocabulary.from_state(json.loads(json.dumps(vocabulary.state()))),
        type(vocabulary).from_state(vocabulary.state()),
    ]
    for other in restored:
        assert type(other) is type(vocabulary)
        assert other == vocabulary
        assert hash(other) == hash(vocabulary)
        assert other.symbols == vocabulary.symbols
        assert other.encode(vocabulary.symbols).tolist() == list(range(len(vocabulary)))


def test_vocabularies_differ_in_kind_items_and_roles():
    variants = [
        *VOCABULARIES,
        WordVocabulary("a b"),
        WordVocabulary("b a"),
        CharVocabulary("ab"),
        CharVocabulary("b", special=("a",)),
        CharVocabulary("b", padding="a"),
        CharVocabulary("b", unknown="a"),
    ]
    for i, one in enumerate(variants):
        assert [one == other for other in variants] == [i == j for j in range(len(variants))]
    assert CharVocabulary("ab") != "ab"


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (CharVocabulary("hello"), "CharVocabulary('ehlo')"),
        (CharVocabulary("a", padding="_"), "CharVocabulary('a', padding='_')"),
        (WordVocabulary("a b", special=("<s>",)), "WordVocabulary(['a', 'b'], special=('<s>',))"),
        (WordVocabulary("a b c d e f"), "WordVocabulary(['a', 'b', 'c', 'd', 'e', ...])"),
    ],
)
def test_a_vocabulary_shows_itself(vocabulary, expected):
    assert repr(vocabulary) == expected


@pytest.mark.parametrize("source", ["", "nonsense", "3", '["a"]', '"ab"', "\xff", "[" * 100_000])
def test_a_foreign_vocabulary_file_is_refused(tmp_path, source):
    (tmp_path / "vocabulary.json").write_bytes(source.encode("latin-1"))
    with pytest.raises(TextError, match=r"vocabulary\.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_missing_vocabulary_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Vocabulary.load(tmp_path / "missing")


DAMAGE = {
    "kind": ["WordVocabulary", "Vocabulary", ["CharVocabulary"]],
    "items": [["b", "a"], ["a", "a"], ["ab"], "ab", [], [1], None],
    "unknown": [3, "a"],
    "padding": ["<unk>"],
    "special": ["x", None],
    "more": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, v) for key in DAMAGE for v in DAMAGE[key]])
def test_a_damaged_state_is_refused(key, value):
    state = CharVocabulary("ab", unknown="<unk>").state()
    assert CharVocabulary.from_state(state).state() == state
    with pytest.raises(TextError, match="not the state of a CharVocabulary"):
        CharVocabulary.from_state({**state, key: value})


@pytest.mark.parametrize("key", WordVocabulary("a").state())
def test_an_incomplete_state_is_refused(key):
    state = WordVocabulary("a").state()
    del state[key]
    with pytest.raises(TextError, match="not the state of a Vocabulary"):
        Vocabulary.from_state(state)


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
