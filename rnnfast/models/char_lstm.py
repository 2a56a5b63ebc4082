"""A language model over characters: embedding, LSTM layers, linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor, nn

from rnnfast.modules import LSTM

if TYPE_CHECKING:
    from rnnfast.text import CharVocabulary

State = tuple[Tensor, Tensor]


class CharLSTMConfig(NamedTuple):
    """The sizes that, with a state_dict, make a CharLSTM."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    embedding_size: int
    dropout: float


class CharLSTM(nn.Module):
    """Predicts the next character from those before it.

    Sizes: B batch, T time, V vocabulary, H hidden, L layers.

    Args:
        vocab_size: V, the number of distinct tokens.
        hidden_size: H, the size of the recurrent state.
        num_layers: L, the number of LSTM layers on top of each other.
        embedding_size: the size of the vector that stands for a token; `hidden_size` if None.
        dropout: the probability of zeroing an element of what goes into the head and, with more
            than one layer, of what passes between the layers; in training only.
        backend: what runs the LSTM layers, see `rnnfast.LSTM`.
        lstm: the class of the LSTM layers: `rnnfast.LSTM`, or `torch.nn.LSTM` to compare with.
            The state_dict is the same either way.
        vocabulary: what `generate` reads and writes text with; not part of the state_dict.

    Raises:
        ValueError: a size is not positive, the dropout is no probability, or the vocabulary does
            not have `vocab_size` characters.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        lstm: Callable[..., nn.RNNBase] = LSTM,
        vocabulary: CharVocabulary | None = None,
    ) -> None:
        super().__init__()
        if embedding_size is None:
            embedding_size = hidden_size
        if min(vocab_size, embedding_size) < 1:
            raise ValueError(
                f"vocab_size and embedding_size must be greater than zero, got {vocab_size} and "
                f"{embedding_size}"
            )
        if vocabulary is not None and len(vocabulary) != vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the vocabulary has {len(vocabulary)} characters"
            )
        self.config = CharLSTMConfig(vocab_size, hidden_size, num_layers, embedding_size, dropout)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocab_size, embedding_size, device=device, dtype=dtype)
        self.lstm = lstm(
            embedding_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
            device=device,
            dtype=dtype,
            **({} if backend is None else {"backend": backend}),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocab_size, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score every possible next token after each token.

        Args:
            tokens: int64 (B, T).
            state: h and c, each (L, B, H), from an earlier call; zeros if None.

        Returns:
            logits (B, T, V), and the state after the last token.

        Raises:
            ValueError: tokens are not two-dimensional.
        """
        if tokens.dim() != 2:
            raise ValueError(
                f"CharLSTM: expected tokens of shape (batch, time), got {tuple(tokens.shape)}"
            )
        y, state = self.lstm(self.embedding(tokens), state)
        return self.head(self.dropout(y)), state

    def init_hidden(self, batch_size: int) -> State:
        """The state before any token: zeros h and c, each (L, B, H)."""
        weight = self.head.weight
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    @overload
    def generate(
        self,
        prompt: str,
        length: int,
        temperature: float = ...,
        *,
        generator: torch.Generator | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Tensor,
        length: int,
        temperature: float = ...,
        *,
        generator: torch.Generator | None = ...,
    ) -> Tensor: ...

    def generate(
        self,
        prompt: str | Tensor,
        length: int,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> str | Tensor:
        """Continue a prompt, one sampled token at a time; nothing is dropped out meanwhile.

        Args:
            prompt: text, for a model with a vocabulary, or int64 tokens (T,) or (B, T); T >= 1.
            length: how many tokens to add.
            temperature: divides the logits: below 1 bolder guesses become rarer, above 1 more
                frequent; 0 always takes the likeliest token.
            generator: where the random numbers come from, on the model's device; torch's default
                generator if None.

        Returns:
            The continuation alone, in the kind of the prompt: text of `length` characters, or
            int64 tokens (length,) or (B, length).

        Raises:
            TextError: the prompt has characters that the vocabulary lacks.
            ValueError: an empty prompt, a wrong rank, a negative length or temperature, or text
                for a model without a vocabulary.
        """
        if not isinstance(prompt, str):
            return self._continue(prompt, length, temperature, generator)
        if self.vocabulary is None:
            raise ValueError(
                "a model without a vocabulary continues tokens, not text; give CharLSTM a "
                "vocabulary, or pass the prompt as tokens"
            )
        tokens = self.vocabulary.encode(prompt).to(self.head.weight.device)
        return self.vocabulary.decode(self._continue(tokens, length, temperature, generator))

    def _continue(
        self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """`generate` for tokens; leaves the training mode as it was."""
        if prompt.dim() not in (1, 2):
            raise ValueError(
                f"prompt must have shape (time,) or (batch, time), got {tuple(prompt.shape)}"
            )
        if prompt.size(-1) == 0:
            raise ValueError("prompt must have at least one token, got an empty one")
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        was_training = self.training
        self.eval()
        try:
            tokens = self._sample(torch.atleast_2d(prompt), length, temperature, generator)
        finally:
            self.train(was_training)
        return tokens.clone().view(*prompt.shape[:-1], length)

    @torch.inference_mode()
    def _sample(
        self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """The `length` tokens (B, length) that follow a prompt (B, T)."""
        tokens = prompt.new_empty(prompt.size(0), length)
        state = self.init_hidden(prompt.size(0))
        latest = prompt
        for position in range(length):
            logits, state = self(latest, state)
            latest = _draw(logits[:, -1].float(), temperature, generator)
            tokens[:, position : position + 1] = latest
        return tokens


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
