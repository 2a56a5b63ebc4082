"""Sampling from a language model: tokens that are read back as the input of the next step.

A model here is a stack of recurrent layers, a linear head that scores every token from the last
layer's h, and what turns a token into the layers' input: an embedding, or nothing where the layers
read tokens themselves (``tokens=True``). On the CPU a whole run, or a chunk of it, is one call into
the extension, which packs the weights once and keeps the states; elsewhere it is a loop.

Sizes: B batch, V vocabulary, N tokens sampled.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend as _backend
from .bases import CELL_OF_MODE, Layers
from .frozen import FrozenLayers
from .tokens import has_hooks, is_plain

# Setting up a fused generation takes about one step of the loop per this many vocabulary tokens.
_SETTING_UP = 512


class Sampling(NamedTuple):
    """How a token is chosen by the scores of all.

    The likelihood of a token is softmax(scores / temperature). Of all tokens only the ``top_k``
    likeliest stay (with all that are as likely as the last of them), and of these the fewest whose
    likelihoods sum to ``top_p`` of theirs.

    Top-k: Fan, Lewis, Dauphin, arXiv:1805.04833; top-p: Holtzman et al., arXiv:1904.09751.
    """

    temperature: float = 1.0
    """0 always takes the highest score."""
    top_k: int = 0
    """0 for all."""
    top_p: float = 1.0

    @classmethod
    def of(
        cls,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
    ) -> Sampling:
        """The choice that these arguments ask for.

        Raises:
            ValueError: One is out of range, or ``greedy`` is asked for together with another.
            TypeError: ``top_k`` is no integer.
        """
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature must be greater than zero and finite, got {temperature}; to always "
                f"take the likeliest token, ask for greedy"
            )
        if top_k is not None:
            top_k = operator.index(top_k)
            if top_k < 1:
                raise ValueError(f"top_k must be at least 1, got {top_k}")
            top_k = min(top_k, 2**31)  # no vocabulary is larger
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if greedy:
            if top_k is not None or top_p is not None:
                raise ValueError("greedy takes the likeliest token: top_k and top_p say nothing")
            return cls(temperature=0.0)
        return cls(temperature, top_k or 0, 1.0 if top_p is None else top_p)


def sample(scores: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Chooses one token for each row of scores (B, V).

    Args:
        scores: (B, V), of any floating-point dtype.
        sampling: How to choose.
        uniforms: (B), from [0, 1): which token, on the line on which the likelihoods of those that
            stay lie one after the other.

    Returns:
        int64 (B).

    Raises:
        ValueError: A row has NaN, or its highest score is not finite.
    """
    scores = scores.double()
    highest, best = scores.max(1, keepdim=True)
    if not highest.isfinite().all():  # the maximum of a row with NaN is NaN
        raise ValueError("the model's scores are not finite")
    if sampling.temperature == 0:
        return best.squeeze(1)
    if 0 < sampling.top_k < scores.shape[1]:
        last = scores.topk(sampling.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    likelihoods = ((scores - highest) / sampling.temperature).exp()
    if sampling.top_p < 1:
        falling, order = likelihoods.sort(dim=1, descending=True, stable=True)
        before = falling.cumsum(1) - falling
        enough = sampling.top_p * falling.sum(1, keepdim=True)
        falling = falling.masked_fill((before >= enough) & (before > 0), 0)
        likelihoods = torch.zeros_like(likelihoods).scatter(1, order, falling)
    sums = likelihoods.cumsum(1)
    aims = uniforms.to(sums).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, aims, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def continue_tokens(
    layers: nn.RNNBase | FrozenLayers,
    head: nn.Linear,
    embedding: nn.Embedding | None,
    prompts: list[Tensor],
    sampling: Sampling,
    generator: torch.Generator | None,
    chunks: list[int],
) -> Iterator[Tensor]:
    """Samples what follows the prompts.

    Args:
        layers: Recurrent layers in one direction, without projection. They may be frozen.
        head: (H -> V).
        embedding: (V, I), or None where the layers read tokens.
        prompts: B of them, int64 (T) on the model's device, T >= 1, which may differ.
        sampling: How tokens are chosen.
        generator: Of the random numbers; torch's default one on the model's device if None.
        chunks: How many tokens to give out at a time; what they are does not depend on it.

    Yields:
        int64 (B, n) for every n of ``chunks``.

    Raises:
        ValueError: The model's scores are not finite.
        IndexError: A prompt has tokens out of range.
    """
    states = _read_prompts(layers, embedding, prompts)
    latest = torch.stack([prompt[-1] for prompt in prompts])
    run: _Loop | _Fused
    few = sum(chunks) * len(prompts) * _SETTING_UP < head.out_features
    if not few and isinstance(layers, (Layers, FrozenLayers)) and _fuses(layers, head, embedding):
        run = _Fused(layers, head, embedding, states, sampling)
    else:
        run = _Loop(layers, head, embedding, states, sampling)
    device = head.weight.device if generator is None else generator.device
    for count in chunks:
        uniforms = torch.rand(
            count, len(prompts), dtype=torch.float64, generator=generator, device=device
        )
        tokens = run(latest, uniforms)
        latest = tokens[:, -1]
        yield tokens


def _read_prompts(
    layers: nn.RNNBase | FrozenLayers, embedding: nn.Embedding | None, prompts: list[Tensor]
) -> tuple[Tensor, ...]:
    """Returns the states (L, B, H) after all tokens of each prompt except the last."""
    shape = (layers.num_layers, len(prompts), layers.hidden_size)
    if isinstance(layers, FrozenLayers):
        like = torch.empty(0, dtype=torch.float32, device="cpu")
    else:
        like = cast(Tensor, layers._flat_weights[0])
    count = 2 if layers.mode == "LSTM" else 1
    if layers.mode == "CUSTOM":
        count = len(cast(Any, layers).cell.state)
    states = tuple(like.new_zeros(shape) for _ in range(count))
    for length in {len(prompt) for prompt in prompts} - {1}:
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.stack([prompts[row][:-1] for row in rows])
        _, after = _step(layers, embedding, tokens, tuple(state[:, rows] for state in states))
        for state, part in zip(states, after, strict=True):
            state[:, rows] = part.to(state.dtype)  # autocast may have changed it
    return states


def _step(
    layers: nn.RNNBase | FrozenLayers,
    embedding: nn.Embedding | None,
    tokens: Tensor,
    states: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the outputs (B, T, H) for tokens (B, T), and the states after them."""
    tokens = tokens if layers.batch_first else tokens.t()
    x = tokens if embedding is None else embedding(tokens)
    y, after = layers(x, states if len(states) > 1 else states[0])
    y = y if layers.batch_first else y.transpose(0, 1)
    return y, after if len(states) > 1 else (after,)


class _Loop:
    """Generates step by step, in Python."""

    def __init__(
        self,
        layers: nn.RNNBase | FrozenLayers,
        head: nn.Linear,
        embedding: nn.Embedding | None,
        states: tuple[Tensor, ...],
        sampling: Sampling,
    ) -> None:
        self.layers, self.head, self.embedding = layers, head, embedding
        self.states, self.sampling = states, sampling

    def __call__(self, latest: Tensor, uniforms: Tensor) -> Tensor:
        """The tokens (B, N) that follow ``latest`` (B), from uniforms (N, B)."""
        tokens = []
        for numbers in uniforms:
            y, self.states = _step(self.layers, self.embedding, latest.unsqueeze(1), self.states)
            latest = sample(self.head(y[:, -1]), self.sampling, numbers)
            tokens.append(latest)
        return torch.stack(tokens, 1)


class _Fused:
    """Generates in the extension; same arguments and results as `_Loop`."""

    def __init__(
        self,
        layers: Layers | FrozenLayers,
        head: nn.Linear,
        embedding: nn.Embedding | None,
        states: tuple[Tensor, ...],
        sampling: Sampling,
    ) -> None:
        if isinstance(layers, FrozenLayers):
            weights = layers._blocks_for(embedding)
        else:
            weights = layers._read(layers._flat_weights_names)
            table = weights[0].t() if embedding is None else F.linear(embedding.weight, weights[0])
            weights = [table, *weights[1:]]
        extension: Any = _backend.EXTENSION
        self.run = extension.Generation(
            _backend.CELL_KINDS[CELL_OF_MODE[layers.mode].name],
            weights,
            layers.bias and isinstance(layers, Layers),  # frozen weights have them within
            list(states),
            head.weight,
            head.bias,
            *sampling,
        ).run

    def __call__(self, latest: Tensor, uniforms: Tensor) -> Tensor:
        tokens: Tensor = self.run(latest, uniforms.cpu())
        return tokens.t()


def _fuses(layers: Layers | FrozenLayers, head: nn.Linear, embedding: nn.Embedding | None) -> bool:
    """Whether the extension can run the whole model."""
    if isinstance(layers, FrozenLayers):
        served = head.weight.dtype is torch.float32
        served = served and (embedding is None or embedding.weight.dtype is torch.float32)
    else:
        served = layers.mode in CELL_OF_MODE
        served = served and _backend.choose(layers.backend, head.weight) == "fused"
    return (
        served
        and head.weight.device.type == "cpu"
        and _backend.EXTENSION is not None
        and _backend.EXTENSION.get_cpu_capability() in _backend.EXTENSION.cpu_capabilities()
        and not torch.is_autocast_enabled("cpu")
        and type(head) is nn.Linear
        and not (has_hooks(head) or has_hooks(layers))
        and (embedding is None or is_plain(embedding))
    )
