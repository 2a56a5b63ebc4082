"""Beam search over the outputs of a recurrent decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], tuple[Tensor, State]]


class Decoded(NamedTuple):
    """The output of a decoder for B sequences.

    Attributes:
        tokens: int64 (B, T), where T is the largest length: the symbols before the end symbol,
            followed by padding.
        lengths: int64 (B), the number of symbols before the end symbol. A sequence without an end
            symbol has the maximum length.
        scores: (B), the log-probability of each output, including its end symbol if it has one.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def beam_search(
    step: Step,
    state: State,
    *,
    start_token: int,
    end_token: int,
    padding_token: int,
    beam_size: int,
    max_length: int,
    length_penalty: float,
) -> Decoded:
    """Search for the likeliest output of every sequence in a batch.

    A step extends each of the K hypotheses of a sequence by every symbol and keeps the K likeliest
    extensions. A hypothesis that ends with the end symbol is complete and leaves the beam
    (Sutskever et al., 2014). The result is the complete hypothesis with the highest
    log P / ((5 + n) / 6)^length_penalty, where n is the number of its symbols including the end
    symbol (Wu et al., 2016). The search stops at `max_length`, or earlier if no open hypothesis can
    become better. A sequence without a complete hypothesis gets its likeliest open one. Ties are
    broken by the order of the hypotheses, then of the symbols. With K = 1 this is greedy search.

    Args:
        step: takes the latest symbols, int64 (N,), and the state; returns the log-probabilities of
            the next symbols (N, V) and the next state.
        state: tensors (L, B, H), the initial state of the decoder.
        start_token: the symbol that the decoder reads first.
        end_token: the symbol that ends a hypothesis.
        padding_token: the symbol that pads the rows of the result.
        beam_size: K, at least 1. The hypotheses are rows of the batch: N = B * K.
        max_length: the maximum number of symbols, including the end symbol; at least 1.
        length_penalty: 0 compares probabilities; larger values favour longer outputs.

    Raises:
        ValueError: `beam_size` or `max_length` is below 1, or `length_penalty` is negative or
            infinite.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size must be 1 or more, got {beam_size}")
    if max_length < 1:
        raise ValueError(f"max_length must be 1 or more, got {max_length}")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be finite and not negative, got {length_penalty}")

    def rank(scores: Tensor, length: int) -> Tensor:
        return scores / ((5 + length) / 6) ** length_penalty

    batch, device = state[0].size(1), state[0].device
    each = torch.arange(batch, device=device)
    state = tuple(part.repeat_interleave(beam_size, 1) for part in state)
    latest = torch.full((batch * beam_size,), start_token, device=device)
    tokens = torch.full((batch, beam_size, max_length), padding_token, device=device)
    dtype = torch.promote_types(state[0].dtype, torch.float32)
    scores = torch.full((batch, beam_size), -math.inf, dtype=dtype, device=device)
    scores[:, 0] = 0  # all hypotheses are still equal, so only one may be extended
    best = Decoded(tokens[:, 0], torch.zeros_like(each), torch.full_like(scores[:, 0], -math.inf))
    best_rank = best.scores

    for length in range(1, max_length + 1):
        log_probabilities, state = step(latest, state)
        vocab_size = log_probabilities.size(1)
        candidates = (scores.view(-1, 1) + log_probabilities).view(batch, beam_size * vocab_size)
        scores, picks = candidates.sort(dim=1, descending=True, stable=True)
        scores, picks = scores[:, :beam_size], picks[:, :beam_size]
        parents, symbols = picks // vocab_size, picks % vocab_size
        tokens = tokens[each.unsqueeze(1), parents]

        # Hypotheses that end in this step have equal lengths, so the likeliest ranks best.
        ends = symbols == end_token
        end_scores, slots = scores.masked_fill(~ends, -math.inf).max(1)
        end_rank = rank(end_scores, length)
        better = end_rank > best_rank
        best = Decoded(
            tokens[each, slots].where(better.unsqueeze(1), best.tokens),
            best.lengths.masked_fill(better, length - 1),
            end_scores.where(better, best.scores),
        )
        best_rank = end_rank.where(better, best_rank)

        tokens[:, :, length - 1] = symbols
        scores = scores.masked_fill(ends, -math.inf)
        # A log-probability can only fall, and its penalised rank is highest at max_length.
        if (rank(scores.amax(1), max_length) <= best_rank).all():
            break
        latest = symbols.flatten()
        rows = (each.unsqueeze(1) * beam_size + parents).flatten()
        state = tuple(part.index_select(1, rows) for part in state)

    incomplete = best_rank == -math.inf
    lengths = best.lengths.masked_fill(incomplete, max_length)
    tokens = tokens[:, 0].where(incomplete.unsqueeze(1), best.tokens)
    scores = scores[:, 0].where(incomplete, best.scores)
    return Decoded(tokens[:, : max(lengths.tolist(), default=0)], lengths, scores)
