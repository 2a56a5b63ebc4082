"""Integer tokens as the input of a layer, in place of their one-hot vectors or embeddings.

W_ih x of a one-hot x is a column of W_ih, and of an embedding x = E[token] a row of E W_ih^T. So a
layer can do with a table (V, G*H) of what W_ih makes of each token, in which it looks its input up;
its gradient is a sum over the steps that read a row. V is the number of tokens; other sizes are
those of `rnnfast.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backend as _backend
from .sequences import Options

# Below, in tokens, finding out which ones occur takes longer than it saves.
_LEAST_TOKENS = 256
# So many tell whether it is worth while.
_SAMPLE = 256


def check(tokens: Tensor, steps: Tensor | None) -> Tensor:
    """The tokens as int64, with 0 in place of what lies beyond the end of a sequence.

    Args:
        tokens: (T, B) or packed (N).
        steps: None, or booleans (T, B): where there is a token.

    Raises:
        TypeError: They are no integers.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise TypeError(f"expected tokens to be integers, got {tokens.dtype}")
    tokens = tokens.long()
    return tokens if steps is None else tokens.where(steps, 0)


def column_major(weight: Tensor) -> Tensor:
    """A copy of W_ih (G*H, V) whose columns, the rows of the table, lie in one piece each."""
    return weight.t().contiguous().t()


def one_hot_input(
    tokens: Tensor, weights: Sequence[Tensor], options: Options, requested: str | None
) -> tuple[Tensor, list[Tensor]]:
    """The input of a stack whose first layer reads one-hot vectors of tokens (T, B).

    Returns:
        What `rnnfast.sequences.run_sequence` takes as x and as weights: tokens (T, B, 1) and
        tables for the first layer; where no kernel of ours runs, the vectors (T, B, V) and
        ``weights``.
    """
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
    embedding: nn.Embedding,
    weights: Sequence[Tensor],
    options: Options,
    requested: str | None,
) -> tuple[Tensor, list[Tensor]]:
    """As `one_hot_input`, where the first layer reads the rows of an embedding (V, I)."""
    # export may leave sizes open, so it has to be asked for before they are
    if not is_plain(embedding) or not _runs_here(weights[0], requested):
        return embedding(tokens), list(weights)
    weight, count = embedding.weight, tokens.numel()
    if count < _LEAST_TOKENS:
        return embedding(tokens), list(weights)
    if weight.shape[0] <= count // 2:
        rows = torch.arange(weight.shape[0], device=weight.device)
    elif _hides_values() or not _repeats(tokens):
        return embedding(tokens), list(weights)
    else:
        rows, numbers = torch.unique(tokens, return_inverse=True)
        if len(rows) > count // 2:
            return embedding(tokens), list(weights)
        tokens = numbers
    vectors = F.embedding(rows, weight, embedding.padding_idx)
    tables = [F.linear(vectors, weights[i]) for i in _first(options)]
    return _with_tables(tokens, tables, weights, options)


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
    """Whether how many tokens there are must not depend on which they are."""
    return (
        torch.compiler.is_compiling()
        or _backend.is_tracing()
        or _backend.transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _repeats(tokens: Tensor) -> bool:
    """Whether it is worth while to find out which tokens occur, by the first ones of them."""
    first = tokens.flatten()[:_SAMPLE]
    return len(torch.unique(first)) <= len(first) * 15 // 16


def _runs_here(weight: Tensor, requested: str | None) -> bool:
    """Whether tables are of use; ONNX has no layers that take them."""
    name = _backend.choose(requested, weight)
    on_cpu = name == "fused" and weight.device.type == "cpu"
    return (on_cpu or name == "reference") and not torch.compiler.is_exporting()


def _first(options: Options) -> list[int]:
    """Where W_ih of the first layer is among the weights, for each direction."""
    return [direction * options.tensors_per_layer for direction in range(options.directions)]


def _with_tables(
    tokens: Tensor, tables: list[Tensor], weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, list[Tensor]]:
    replaced = list(weights)
    for i, table in zip(_first(options), tables, strict=True):
        replaced[i] = table
    return tokens.unsqueeze(-1), replaced
