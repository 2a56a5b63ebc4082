"""One-hot vectors, hashed features, co-occurrence counts, and vectors by truncated SVD."""

import itertools
import random
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from rnnfast.text import (
    CharVocabulary,
    TextError,
    WordVocabulary,
    cooccurrence,
    hash_features,
    hash_tokens,
    one_hot,
    reduce_svd,
)

DOCUMENTS = [["the", "cat", "the"], ["a", "dog"], []]


def random_tokens(shape, vocab_size, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@cache
def decaying_matrix(rows, columns, factor):
    """A matrix with the singular values 1, factor, factor ** 2, ..."""
    rank = min(rows, columns)
    left = torch.linalg.qr(random_matrix(rows, rank, 1)).Q
    right = torch.linalg.qr(random_matrix(columns, rank, 2)).Q
    return left * factor ** torch.arange(rank) @ right.T


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_one_hot_has_a_one_at_the_token(shape, dtype):
    tokens = random_tokens(shape, 7)
    expected = nn.functional.one_hot(tokens, 7)
    hot = one_hot(tokens.to(dtype), 7)
    assert hot.dtype == torch.float32
    assert torch.equal(hot, expected.float())
    array = one_hot(tokens.to(dtype).numpy(), 7)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected.numpy())


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool"])
def test_one_hot_has_the_dtype_asked_for(dtype):
    expected = np.eye(4)[[3, 0]].astype(dtype)
    np.testing.assert_array_equal(one_hot(np.array([3, 0]), 4, dtype), expected, strict=True)
    hot = one_hot(torch.tensor([3, 0]), 4, getattr(torch, dtype))
    np.testing.assert_array_equal(hot.numpy(), expected, strict=True)


LETTERS = CharVocabulary("abc", special=("<s>",))
WORDS = WordVocabulary("the cat sat", unknown="<unk>")


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "places"),
    [
        (2, 4, 2),
        (np.int64(2), 4, 2),
        ([2, 0], 4, [2, 0]),
        ([[2], [0]], 4, [[2], [0]]),
        ("b", LETTERS, 2),
        ("<s>", LETTERS, 0),
        (["b", "<s>"], LETTERS, [2, 0]),
        (iter("ab"), LETTERS, [1, 2]),
        (LETTERS.encode("ca"), LETTERS, [3, 1]),
        (3, LETTERS, 3),
        ("cat", WORDS, 2),
        ("dog", WORDS, 0),
    ],
)
def test_one_hot_of_symbols_and_numbers(tokens, vocabulary, places):
    hot = one_hot(tokens, vocabulary)
    assert torch.equal(hot, torch.eye(4)[torch.tensor(places)])
    assert hot.dtype is torch.float32


def test_one_hot_of_an_array_with_a_vocabulary():
    hot = one_hot(np.array([2, 0]), LETTERS, np.int8)
    np.testing.assert_array_equal(hot, np.eye(4, dtype=np.int8)[[2, 0]], strict=True)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "error", "message"),
    [
        ("b", 4, TextError, "integer tokens, got <U1; the `encode` method of a"),
        (["b"], 4, TextError, "integer tokens, got <U1; the `encode` method of a"),
        ("ab", LETTERS, TextError, r"one symbol, got 'ab', a text of 2: .*encode\(text\)"),
        ("the cat", WORDS, TextError, "one symbol, got 'the cat', a text of 2"),
        ("", LETTERS, TextError, "one symbol, got '', a text of 0"),
        ("x", LETTERS, TextError, "lacks 'x'"),
        (["a", "x"], LETTERS, TextError, "lacks 'x'"),
        ("a", ["a", "b"], TypeError, r"a vocabulary, got \['a', 'b'\]: make one with WordVoc"),
        ("a", {"a": 0}, TypeError, "should be an integer or a vocabulary"),
        (True, 4, TextError, "integer tokens, got bool"),
        (1.0, 4, TextError, "integer tokens, got float"),
        (4, LETTERS, TextError, "between 0 and 3, got 4"),
    ],
)
def test_one_hot_says_what_it_takes(tokens, vocabulary, error, message):
    with pytest.raises(error, match=message):
        one_hot(tokens, vocabulary)


def test_arrays_of_any_layout_are_taken():
    tokens = np.arange(12).reshape(3, 4)
    tokens.flags.writeable = False
    for view in (tokens, tokens[::-1, ::-2], tokens.T, tokens.astype(">i4")):
        np.testing.assert_array_equal(one_hot(view, 12), np.eye(12)[view])


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "error", "message"),
    [
        ([0, 3], 3, TextError, "between 0 and 2, got 0 to 3"),
        ([-1, 1], 3, TextError, "between 0 and 2, got -1 to 1"),
        ([0.0], 3, TextError, "integer tokens, got .*float"),
        ([1j], 3, TextError, "integer tokens, got .*complex"),
        ([True], 3, TextError, "integer tokens, got .*bool"),
        ([0], 0, ValueError, "vocab_size must be a positive integer, got 0"),
        ([0], 2.0, ValueError, "vocab_size must be a positive integer, got 2.0"),
    ],
)
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("function", [one_hot, lambda *given: cooccurrence(*given, 1)])
def test_impossible_tokens_are_refused(function, kind, tokens, vocab_size, error, message):
    with pytest.raises(error, match=message):
        function(kind(tokens), vocab_size)


def test_a_document_is_the_sum_of_its_items():
    vectors = {item: hash_features([item], 64) for item in ("the", "cat", "a", "dog")}
    for item, vector in vectors.items():
        assert vector.abs().sum() == 1
        assert vector.abs().argmax() == hash_tokens([item], 64)[0]
    expected = [sum((vectors[item] for item in d), torch.zeros(64)) for d in DOCUMENTS]
    for document, vector in zip(DOCUMENTS, expected, strict=True):
        assert torch.equal(hash_features(document, 64), vector)
    generators = ((item for item in document) for document in DOCUMENTS)
    assert torch.equal(hash_features(generators, 64), torch.stack(expected))


def test_unsigned_features_count_the_hashed_tokens():
    words = [str(number % 40) for number in range(100)]
    tokens = hash_tokens(iter(words), 10)
    assert tokens.dtype == torch.int64
    counts = torch.bincount(tokens, minlength=10).float()
    assert torch.equal(hash_features(words, 10, signed=False), counts)
    assert hash_tokens([], 10).shape == (0,)


def test_hashes_are_spread_evenly_and_signs_are_fair():
    words = [f"word {number}" for number in range(20_000)]
    counts = torch.bincount(hash_tokens(words, 16), minlength=16)
    assert 1100 < counts.min() < counts.max() < 1400  # expected 1250, standard deviation 34
    signs = torch.stack([hash_features([word], 1)[0] for word in words])
    assert abs(signs.mean()) < 0.03


def test_signs_make_the_inner_product_right_on_average():
    # Weinberger et al. (2009), lemma 2; another prefix acts as another hash function.
    one, other = [*"aabcdef"], [*"aefghij"]
    exact = 2 * 1 + 1 + 1  # a, e, f
    products = {True: [], False: []}
    for prefix, signed in itertools.product(range(2000), products):
        hashed = [
            hash_features([f"{prefix}{item}" for item in document], 8, signed)
            for document in (one, other)
        ]
        products[signed].append(float(hashed[0] @ hashed[1]))
    assert np.mean(products[True]) == pytest.approx(exact, abs=0.25)
    # Every pair of different items collides with a probability of 1 / 8.
    assert np.mean(products[False]) == pytest.approx(exact + (7 * 7 - exact) / 8, abs=0.25)


def test_hashes_are_the_same_in_every_process():
    code = "from rnnfast.text import *; print(hash_tokens(['naïve', '漢', '', '\\ud800'], 2**40))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(hash_tokens(["naïve", "漢", "", "\ud800"], 2**40))
    assert hash_tokens(["hello"], 1000).tolist() == [595]  # stored tokens must remain valid


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hash_features("abc", 4), TypeError, "items of a document, got the string 'abc'"),
        (lambda: hash_features([["a"], "bc"], 4), TypeError, "iterable of strings, got 'bc'"),
        (lambda: hash_features([["a"], [3]], 4), TypeError, "expected strings, got 3"),
        (lambda: hash_features([["a"], 3], 4), TypeError, "iterable of strings, got 3"),
        (lambda: hash_features(["a"], 0), ValueError, "size must be a positive integer, got 0"),
        (lambda: hash_tokens("abc", 4), TypeError, "iterable of strings, got 'abc'"),
        (lambda: hash_tokens([3], 4), TypeError, "expected strings, got 3"),
        (lambda: hash_tokens(["a"], -1), ValueError, "size must be a positive integer, got -1"),
    ],
)
def test_what_cannot_be_hashed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (1,), (30,), (3, 9), (2, 2, 7)])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_cooccurrence_counts_pairs_of_places(shape, window):
    tokens = random_tokens(shape, 4)
    expected = np.zeros((4, 4), dtype=np.int64)
    for sequence in tokens.reshape(-1, shape[-1]).tolist() if tokens.numel() else []:
        for (s, i), (t, j) in itertools.product(enumerate(sequence), repeat=2):
            expected[i, j] += 0 < abs(s - t) <= window
    counts = cooccurrence(tokens, 4, window)
    assert torch.equal(counts, counts.T)
    np.testing.assert_array_equal(counts.numpy(), expected, strict=True)
    np.testing.assert_array_equal(cooccurrence(tokens.numpy(), 4, window), expected, strict=True)


def test_impossible_windows_and_sequences_are_refused():
    with pytest.raises(ValueError, match="window must be a positive integer, got 0"):
        cooccurrence(torch.tensor([0, 1]), 2, 0)
    with pytest.raises(TextError, match="expected a sequence of tokens, got a single one"):
        cooccurrence(torch.tensor(0), 2, 1)


@pytest.mark.parametrize(
    ("matrix", "size", "tolerance"),
    [
        (random_matrix(20, 12), 1, 1e-12),
        (random_matrix(12, 20), 5, 1e-12),
        (random_matrix(12, 20), 12, 1e-12),
        (random_matrix(300, 220), 40, 1e-12),  # exact: 220 is below 2 * 40 + 256
        ((400, 350, 0.97), 10, 1e-10),  # the search space has 276 of 350 dimensions
        ((350, 400, 0.97), 10, 1e-10),
    ],
)
@pytest.mark.parametrize("kind", ["array", "tensor", "COO", "CSR", "SciPy"])
def test_vectors_are_those_of_the_largest_singular_values(matrix, size, tolerance, kind):
    if isinstance(matrix, tuple):
        matrix = decaying_matrix(*matrix)
    given = {
        "array": matrix.numpy(),
        "tensor": matrix,
        "COO": matrix.to_sparse(),
        "CSR": matrix.to_sparse_csr(),
        "SciPy": scipy.sparse.csc_array(matrix.numpy()),
    }[kind]
    vectors = reduce_svd(given, size)
    assert isinstance(vectors, np.ndarray if kind in ("array", "SciPy") else torch.Tensor)
    assert vectors.dtype == (np.float64 if isinstance(vectors, np.ndarray) else torch.float64)
    vectors = torch.as_tensor(vectors).numpy()
    np.testing.assert_allclose(vectors, vectors_by_numpy(matrix, size), atol=tolerance * 10)


def vectors_by_numpy(matrix, size):
    """U S with the largest entry of each direction positive."""
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    largest = np.abs(Vh[:size]).argmax(1)
    return U[:, :size] * S[:size] * np.sign(Vh[np.arange(size), largest])


def test_a_search_too_narrow_is_nearly_the_best():
    # The hardest case: slowly decaying singular values in more than 2 * 3 + 256 dimensions.
    matrix = random_matrix(700, 600)
    S = torch.linalg.svdvals(matrix)[:3]
    found = reduce_svd(matrix, 3).norm(dim=0)
    assert (found <= S * (1 + 1e-12)).all()
    assert (found > 0.97 * S).all()


def test_the_result_is_the_same_every_time_and_leaves_the_random_numbers_alone():
    matrix = random_matrix(700, 600)
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(reduce_svd(matrix, 3))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_of_equally_large_entries_the_first_is_positive():
    matrix = torch.tensor([[3.0, -3, 0], [1, 1, 0]])
    axes = torch.tensor([[1.0, -1, 0], [1, 1, 0]]) / 2**0.5
    for given in (matrix, -matrix):
        torch.testing.assert_close(reduce_svd(given, 2), given @ axes.T)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float32])
def test_other_types_become_the_default_dtype(dtype):
    matrix = random_tokens((6, 5), 2).to(dtype)
    for given in (matrix, matrix.numpy(), scipy.sparse.coo_array(matrix.int().numpy())):
        vectors = torch.as_tensor(reduce_svd(given, 5))
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors @ vectors.T, matrix.float() @ matrix.float().T)


def test_gradients_pass_through_the_projection_alone():
    rows = random_matrix(9, 4).requires_grad_()
    vectors = reduce_svd(rows, 2)
    axes = torch.linalg.lstsq(rows.detach(), vectors.detach()).solution
    vectors[:, 1].sum().backward()
    torch.testing.assert_close(rows.grad, axes[:, 1].expand(9, 4))


def test_one_hot_rows_keep_the_most_frequent_tokens():
    tokens = torch.tensor([2, 0, 2, 1, 2, 0])
    vectors = reduce_svd(one_hot(tokens, 4), 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 0], [1, 0], [0, 1]])
    torch.testing.assert_close(vectors, expected)


@pytest.mark.parametrize(
    ("matrix", "size", "error", "message"),
    [
        (torch.ones(3, 4), 0, ValueError, "size must be a positive integer, got 0"),
        (torch.ones(3, 4), 4, ValueError, r"smaller side of the matrix, got 4 for \(3, 4\)"),
        (torch.ones(0, 4), 1, ValueError, r"smaller side of the matrix, got 1 for \(0, 4\)"),
        (torch.ones(3), 1, ValueError, r"matrix of shape \(N, D\), got \(3,\)"),
        (torch.zeros(3, 4), 1, ValueError, "only zeros"),
        (torch.zeros(3, 4).to_sparse(), 1, ValueError, "only zeros"),
        (np.full((2, 2), np.nan), 1, ValueError, "finite entries"),
        (scipy.sparse.eye_array(3) * np.inf, 1, ValueError, "finite entries"),
        (torch.ones(2, 2, dtype=torch.complex64), 1, TypeError, "real entries, got .*complex64"),
        ([[1.0]], 1, TypeError, "a SciPy sparse matrix, got list"),
    ],
)
def test_impossible_matrices_are_refused(matrix, size, error, message):
    with pytest.raises(error, match=message):
        reduce_svd(matrix, size)


def test_words_used_alike_have_vectors_alike():
    draw = random.Random(0)
    kinds = {
        "animal": (["cat", "dog", "horse"], ["eats", "sleeps", "runs"]),
        "vehicle": (["car", "bus", "truck"], ["brakes", "starts", "rusts"]),
    }
    sentences = []
    for _ in range(400):
        nouns, verbs = draw.choice(list(kinds.values()))
        sentences.append(f"the {draw.choice(nouns)} {draw.choice(verbs)} .")
    text = " ".join(sentences)
    vocabulary = WordVocabulary(text)
    vectors = reduce_svd(cooccurrence(vocabulary.encode(text), len(vocabulary), 2), 4)

    def likeness(one, other):
        pair = vectors[vocabulary.token(one)], vectors[vocabulary.token(other)]
        return nn.functional.cosine_similarity(*pair, dim=0)

    groups = [words for kind in kinds.values() for words in kind]
    for i, group in enumerate(groups):
        others = [word for j, words in enumerate(groups) if j != i for word in words]
        for word in group:
            alike = min(likeness(word, peer) for peer in group)
            unlike = max(likeness(word, other) for other in others)
            assert alike > unlike, (word, alike, unlike)


def test_reduce_svd_of_centred_columns_is_principal_component_analysis():
    torch.manual_seed(0)
    rows = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    _, _, axes = torch.pca_lowrank(rows, q=6, center=True)
    expected = (rows - rows.mean(0)) @ axes[:, :2]
    components = reduce_svd(rows - rows.mean(0), 2)
    signs = (components * expected).sum(0).sign()
    torch.testing.assert_close(components, expected * signs)
    variance = components.var(0)
    torch.testing.assert_close(variance, torch.linalg.eigvalsh(rows.T.cov()).flip(0)[:2])
