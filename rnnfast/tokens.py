"""Integer tokens as the input of a layer, in place of their one-hot vectors or embeddings.

For a one-hot x, W_ih x is a column of W_ih. For an embedding x = E[token] it is a row of E W_ih^T.
So a layer needs no product with W_ih for every step: it looks W_ih x up in a table (V, G*H) with a
row for each token. The gradient of a row is the sum over the steps that read it. V is the number of
tokens; other sizes are those of `rnnfast.functional`.

The table of one-hot tokens is W_ih^T, a view of the parameter that is contiguous as (G*H, V). The
kernels copy the columns that occur into a compact table. No copy is kept from call to call, as
nothing tells whether it is still right: writes through ``weight.data`` leave the version counter of
``weight`` as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend as _backend
from . import checks
from .sequences import Options

# With fewer tokens, to find those that occur takes longer than a table saves.
_LEAST_TOKENS = 256
# How many of the tokens are looked at to see whether tokens repeat.
_SAMPLE = 256


def read(
    tokens: Any,
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
    embedding: nn.Embedding | Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    *,
    packed: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """What `rnnfast.sequences.run_sequence` takes as x and as weights for an input of tokens.

    Args:
        tokens: (T, B), (B, T) with ``options.batch_first``, (T) for a single sequence, or (N) with
            ``packed``.
        weights: As the layers have them.
        options: How the layers are put together.
        requested: The backend that the call asks for, or None.
        embedding: The embedding, or its weight (V, I); None for one-hot vectors.
        lengths: None, or how many steps each sequence has.
        packed: Whether the tokens are the data of a PackedSequence.

    Returns:
        Tokens with a last dimension of 1, and weights in which tables (V, G*H) take the place of
        the first layer's W_ih. Or vectors (..., I), and the weights as they are, where no kernels
        for tables run or a table would not pay.

    Raises:
        RuntimeError: The tokens have other dimensions, or the embedding has another size.
        TypeError: They are no integers, or the lengths are none.
        ValueError: A length is out of range.
        IndexError: A token is out of range. The kernels find that out later where they run.
    """
    checks.refuse_freed(parameter=weights)
    tokens = checked(tokens, lengths, options.batch_first, packed=packed)
    if embedding is None:
        return one_hot_input(tokens, weights, options, requested)
    check_embedding(embedding, weights[0].shape[-1])
    return embedded_input(tokens, embedding, weights, options, requested)


def checked(
    tokens: Any,
    lengths: Tensor | Sequence[int] | None,
    batch_first: bool,
    *,
    packed: bool = False,
) -> Tensor:
    """The tokens of a call as int64, with 0 beyond the end of each sequence.

    The arguments and errors are those of `read`.
    """
    if not isinstance(tokens, Tensor) or not 1 <= tokens.dim() <= (1 if packed else 2):
        found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise RuntimeError(f"expected tokens of 1 or 2 dimensions, time and batch, got {found}")
    checks.refuse_freed(tokens=tokens)
    tokens = check(tokens)
    if lengths is not None and tokens.dim() == 2:
        tokens = _without_padding(tokens, lengths, batch_first)
    return tokens


def check_embedding(embedding: nn.Embedding | Tensor, inputs: int) -> None:
    """RuntimeError unless the vectors of an embedding have I = ``inputs`` elements."""
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    checks.refuse_freed(embedding=weight)
    if weight.shape[-1] != inputs:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {inputs}, got {weight.shape[-1]}"
        )


def check(tokens: Tensor) -> Tensor:
    """The tokens as int64; TypeError if they are no integers."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"expected tokens to be integers, got {tokens.dtype}")
    return tokens.long()


def _without_padding(tokens: Tensor, lengths: Tensor | Sequence[int], batch_first: bool) -> Tensor:
    """The tokens with 0 beyond the end of each sequence, where there may be any number."""
    known = checks.check_extras(tokens, lengths, None, False, batch_first).lengths
    assert known is not None
    time = torch.arange(tokens.shape[1 if batch_first else 0], device=tokens.device)
    steps = time.unsqueeze(1) < known.to(tokens.device)
    return tokens.where(steps.t() if batch_first else steps, 0)


def one_hot_input(
    tokens: Tensor, weights: Sequence[Tensor], options: Options, requested: str | None
) -> tuple[Tensor, list[Tensor]]:
    """What `read` returns for one-hot vectors. The table is W_ih^T, a view of the parameter."""
    if _runs_here(weights[0], requested):
        return _with_tables(tokens, [weights[i].t() for i in _first(options)], weights, options)
    unknown = torch.compiler.is_compiling() or _backend.is_tracing()
    if tokens.numel() and not (unknown or _backend.transforms_active()):
        low, high = (int(limit) for limit in tokens.aminmax())
        if low < 0 or high >= weights[0].shape[1]:
            raise IndexError(
                f"index out of range: expected tokens from 0 to {weights[0].shape[1] - 1}, got "
                f"{low if low < 0 else high}"
            )
    return F.one_hot(tokens, weights[0].shape[1]).to(weights[0].dtype), list(weights)


def embedded_input(
    tokens: Tensor,
    embedding: nn.Embedding | Tensor,
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
) -> tuple[Tensor, list[Tensor]]:
    """What `read` returns for an embedding. The table is E W_ih^T, of the rows of E that occur."""
    # before the sizes are looked at, because torch.export may leave them open
    found = occurring(tokens, embedding) if _runs_here(weights[0], requested) else None
    if found is None:
        return look_up(tokens, embedding), list(weights)
    vectors, places = found
    tables = [F.linear(vectors, weights[i]) for i in _first(options)]
    return _with_tables(places, tables, weights, options)


def occurring(tokens: Tensor, embedding: nn.Embedding | Tensor) -> tuple[Tensor, Tensor] | None:
    """The vectors of the tokens that occur, and for each of ``tokens`` the place of its vector.

    Returns:
        None where the embedding does more than to look into its weight, or where so many tokens
        occur that a product with each of their vectors would not pay.
    """
    if isinstance(embedding, Tensor):
        weight, padding, plain = embedding, None, True
    else:
        weight, padding, plain = embedding.weight, embedding.padding_idx, is_plain(embedding)
    count = tokens.numel() if plain else 0
    if count < _LEAST_TOKENS:
        return None
    if weight.shape[0] <= count // 2:
        rows = torch.arange(weight.shape[0], device=weight.device)
    elif _hides_values() or not _repeats(tokens):
        return None
    else:
        rows, places = torch.unique(tokens, return_inverse=True)
        if len(rows) > count // 2:
            return None
        tokens = places
    return F.embedding(rows, weight, padding), tokens


def look_up(tokens: Tensor, embedding: nn.Embedding | Tensor) -> Tensor:
    """The vectors of the tokens."""
    if isinstance(embedding, Tensor):
        return F.embedding(tokens, embedding)
    return embedding(tokens)


def is_plain(embedding: nn.Embedding) -> bool:
    """Whether a call of the embedding is nothing but a look into its weight."""
    return (
        getattr(type(embedding), "forward", None) is nn.Embedding.forward
        and "forward" not in vars(embedding)
        and not has_hooks(embedding)
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _hides_values() -> bool:
    """Whether token values are unavailable, or shapes must not depend on them."""
    return (
        torch.compiler.is_compiling()
        or _backend.is_tracing()
        or _backend.transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _repeats(tokens: Tensor) -> bool:
    """Whether tokens repeat often enough for a table of those that occur, by a sample."""
    first = tokens.flatten()[:_SAMPLE]
    return len(torch.unique(first)) <= len(first) * 15 // 16


def _runs_here(weight: Tensor, requested: str | None) -> bool:
    """Whether kernels that read tables run. ONNX has no layers that read tables."""
    name = _backend.choose(requested, weight)
    on_cpu = name == "fused" and weight.device.type == "cpu"
    return (on_cpu or name == "reference") and not torch.compiler.is_exporting()


def _first(options: Options) -> list[int]:
    """The places of the first layer's W_ih among the weights, one for each direction."""
    return [direction * options.tensors_per_layer for direction in range(options.directions)]


def _with_tables(
    tokens: Tensor, tables: list[Tensor], weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, list[Tensor]]:
    replaced = list(weights)
    for i, table in zip(_first(options), tables, strict=True):
        replaced[i] = table
    return tokens.unsqueeze(-1), replaced
