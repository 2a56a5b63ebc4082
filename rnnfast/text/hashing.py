"""The hashing trick: tokens and feature vectors for strings without a vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from rnnfast.text.checks import as_strings, check_positive


def hash_features(
    items: Iterable[str] | Iterable[Iterable[str]], size: int, signed: bool = True
) -> Tensor:
    """Sum up the items of a document in a vector of fixed size.

    phi_i = sum of xi(item) over the items with h(item) = i, where h hashes to 0 .. size - 1 and
    xi to +1 or -1 (Weinberger et al., 2009). With these signs the inner product of two documents
    is unbiased: it is right on average over hash functions. Without them every collision increases
    it. The hash is BLAKE2b, so it is the same in every process.

    >>> hash_features(["the", "cat", "the"], 8, signed=False).sum()
    tensor(3.)

    Args:
        items: the strings of one document, or several documents, each an iterable of strings. A
            list of strings is always one document, so split texts first, for example by
            `split_words`.
        size: the length of the vector.
        signed: whether to add xi(item) for each item, or 1.

    Returns:
        (size,) for one document, (N, size) for N, in torch's default dtype and on the CPU.

    Raises:
        TypeError: an item is not a string, or a document is itself a string.
        ValueError: size is not a positive integer.
    """
    check_positive(size=size)
    if isinstance(items, str):
        raise TypeError(f"expected the items of a document, got the string {items!r:.50}")
    listed = list(items)
    if all(isinstance(item, str) for item in listed):
        return _sum(as_strings(listed), size, signed)
    return torch.stack([_sum(as_strings(document), size, signed) for document in listed])


def hash_tokens(words: Iterable[str], size: int) -> Tensor:
    """Turn words into tokens h(word), int64 (T,) on the CPU, for an embedding of `size` rows.

    h is the hash of `hash_features`. Different words may share a token. If there are V words, the
    probability that a word shares its token with no other is (1 - 1 / size) ** (V - 1).

    Raises:
        TypeError: a word is not a string, or `words` is a single string, which must be split first.
        ValueError: size is not a positive integer.
    """
    check_positive(size=size)
    tokens = [_hash(word, size)[0] for word in as_strings(words)]
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")


def _sum(document: list[str], size: int, signed: bool) -> Tensor:
    """The vector (size,) of one document."""
    vector = torch.zeros(size, dtype=torch.get_default_dtype(), device="cpu")
    hashes = [_hash(item, size) for item in document]
    tokens = vector.new_tensor([token for token, _ in hashes], dtype=torch.int64)
    signs = vector.new_tensor([sign if signed else 1 for _, sign in hashes])
    return vector.index_add_(0, tokens, signs)


def _hash(item: str, size: int) -> tuple[int, int]:
    """h(item) and xi(item), computed from different bits of one hash."""
    data = item.encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return (number >> 1) % size, 1 - 2 * (number & 1)
