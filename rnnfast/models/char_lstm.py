"""A language model over characters or words: embedding, LSTM layers, linear head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rnnfast import tokens
from rnnfast.frozen import FrozenLayers
from rnnfast.generation import Sampling, continue_tokens
from rnnfast.models.results import as_step, pair
from rnnfast.modules import LSTM
from rnnfast.text import TextError, Vocabulary

State = tuple[Tensor, Tensor]
Prompt = TypeVar("Prompt", str, list[str], Tensor)
_PIECE = 32  # tokens generated at once if there is a callback or a stop text
_MOST_AT_ONCE = 4096  # otherwise; a limit lets Ctrl-C take effect
_REMEDIES = {
    1: "tokens.unsqueeze(0) makes a batch of one sequence",
    3: "vectors.argmax(-1) turns one-hot vectors into tokens",
}


class CharLSTMConfig(NamedTuple):
    """The arguments of a CharLSTM that its state_dict does not contain."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    embedding_size: int
    dropout: float
    tied_weights: bool = False


class CharLSTM(nn.Module):
    """Predicts the next character of a text, or the next word with a `WordVocabulary`.

    Sizes: B batch, T time, V vocabulary, H hidden, L layers.

    Args:
        vocab_size: V, the number of distinct tokens.
        hidden_size: H, the size of the recurrent state.
        num_layers: L, the number of stacked LSTM layers.
        embedding_size: the size of the embedding of a token; `hidden_size` if None.
        dropout: the probability of dropout, in training only, on the input of the head and, with
            more than one layer, between the layers.
        tied_weights: whether the head uses the weights of the embedding (Press, Wolf,
            arXiv:1608.05859). The embedding must then have size H.
        backend: the backend of the LSTM layers, see `rnnfast.LSTM`.
        lstm: the class of the LSTM layers: `rnnfast.LSTM`, or `torch.nn.LSTM` for comparisons.
            Both have the same state_dict.
        vocabulary: the vocabulary that `generate` needs for text. It is not in the state_dict.

    Raises:
        ValueError: a size is not positive, the dropout is not a probability, the embedding has the
            wrong size for tied weights, or the vocabulary does not have `vocab_size` symbols.
    """

    vocabulary: Vocabulary | None = None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        tied_weights: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        lstm: Callable[..., nn.RNNBase] = LSTM,
        vocabulary: Vocabulary | None = None,
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
                f"vocab_size is {vocab_size}, but the vocabulary has {len(vocabulary)} symbols"
            )
        if tied_weights and embedding_size != hidden_size:
            raise ValueError(
                f"tied_weights needs embedding_size to be hidden_size, got {embedding_size} and "
                f"{hidden_size}"
            )
        self.config = CharLSTMConfig(
            vocab_size, hidden_size, num_layers, embedding_size, dropout, tied_weights
        )
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
        if tied_weights:
            self.embedding.weight = self.head.weight  # the head's initial values suit both

    def forward(self, tokens: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        """Compute the logits of the next token after each token.

        The loss is ``cross_entropy(logits.flatten(0, 1), targets.flatten())``. The probabilities
        are ``logits.softmax(-1)``. `generate` is the whole sampling loop. If T is 1, a softmax over
        the time axis would make every probability 1; it raises ValueError instead.

        Args:
            tokens: int64 (B, T).
            hidden: h and c, each (L, B, H), from an earlier call; zeros if None.

        Returns:
            logits (B, T, V), and the state (h, c) after the last token.

        Raises:
            ValueError: the tokens are not two-dimensional.
        """
        if tokens.dim() != 2:
            raise ValueError(
                f"CharLSTM: expected tokens of shape (batch, time), got {tuple(tokens.shape)}; "
                f"{_REMEDIES.get(tokens.dim(), 'the numbers of the symbols, one row per sequence')}"
            )
        if isinstance(self.lstm, (LSTM, FrozenLayers)):
            y, state = self.lstm(tokens, hidden, embedding=self.embedding)
        else:
            y, state = self.lstm(self.embedding(tokens), hidden)
        return pair(as_step(self.head(self.dropout(y))), state)

    @property
    def vocab_size(self) -> int:
        """V, the number of distinct tokens."""
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        """H, the size of the recurrent state."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """L, the number of LSTM layers."""
        return self.config.num_layers

    @property
    def embedding_size(self) -> int:
        """The size of the embedding of a token."""
        return self.config.embedding_size

    def init_hidden(self, batch_size: int = 1) -> State:
        """The state before any token: zeros h and c, each (L, B, H)."""
        weight = self.head.weight
        shape = (self.num_layers, batch_size, self.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def generate(
        self,
        prompt: Prompt,
        length: int,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        stop: str | None = None,
        callback: Callable[[Prompt], None] | None = None,
    ) -> Prompt:
        """Continue a prompt by sampling one token after the other, without dropout.

        Args:
            prompt: a text or a list of texts, for a model with a vocabulary; or int64 tokens (T,)
                or (B, T). No prompt may be empty.
            length: the number of tokens to add.
            temperature: the logits are divided by it. Values below 1 make unlikely tokens rarer,
                values above 1 make them more frequent.
            top_k: if not None, sample only from the `top_k` likeliest tokens.
            top_p: if not None, sample only from the smallest set of likeliest tokens whose
                probabilities sum to at least `top_p`.
            greedy: always take the likeliest token.
            seed: makes the result repeatable.
            generator: the generator of the random numbers; torch's default generator if neither a
                seed nor a generator is given.
            stop: if not None, a text ends before its first occurrence of this string. It is a
                symbol of the vocabulary, such as an end symbol, or text in the form in which the
                vocabulary's `decode` writes it.
            callback: if not None, called with each new piece of the continuation, which has the
                type of the prompt: a text, a list of texts or tokens. In a list, the pieces of
                texts that have stopped are empty. The concatenated pieces are the return value.

        Returns:
            The continuation without the prompt, in the type of the prompt: the text of `length`
            tokens, or of fewer if `stop` occurs; a list of such texts; or int64 tokens (length,) or
            (B, length).

        Raises:
            TextError: the prompt or `stop` has characters or words that are not in the vocabulary,
                or the vocabulary's `decode` can never write `stop`.
            TypeError: the tokens of the prompt or `top_k` are not integers.
            IndexError: a token of the prompt is not in the vocabulary.
            ValueError: an empty prompt, a wrong number of dimensions, a negative length, a sampling
                argument out of range, a text for a model without a vocabulary, `stop` for tokens,
                an empty `stop`, both a seed and a generator, or logits that are not finite.
        """
        sampling = Sampling.of(temperature, top_k, top_p, greedy)
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if seed is not None:
            if generator is not None:
                raise ValueError("a seed and a generator were given; expected one of them")
            generator = torch.Generator(self.head.weight.device).manual_seed(seed)
        prompts = self._prompts(prompt)
        if stop is not None and (isinstance(prompt, Tensor) or not stop):
            raise ValueError("stop must be a text of at least one character, and so the prompt")
        if stop is not None and self.vocabulary is not None:
            _check_stop(self.vocabulary, stop)
        pieces = self._continue(prompts, length, sampling, generator, bool(callback or stop))
        if isinstance(prompt, Tensor):
            shape = prompt.shape[:-1]
            found = [prompts[0].new_empty(*shape, 0)]
            for piece in pieces:
                found.append(piece.reshape(*shape, piece.shape[1]))
                if callback is not None:
                    callback(found[-1])
            return torch.cat(found, -1)
        assert self.vocabulary is not None
        texts = [_Text(self.vocabulary, stop) for _ in prompts]
        for certain in self._grow(texts, pieces):
            if callback is not None:
                callback(certain[0] if isinstance(prompt, str) else certain)
        return texts[0].text if isinstance(prompt, str) else [text.text for text in texts]

    def _grow(self, texts: list[_Text], pieces: Iterator[Tensor]) -> Iterator[list[str]]:
        """Extend the texts until all have stopped; yield the new final part of each."""
        for rows in pieces:
            yield [text.add(row) for text, row in zip(texts, rows, strict=True)]
            if all(text.stopped for text in texts):
                break
        held_back = [text.end() for text in texts]
        if any(held_back):
            yield held_back

    def _prompts(self, prompt: str | list[str] | Tensor) -> list[Tensor]:
        """Turn a prompt into one tensor of tokens (T,) for each sequence, on the model's device."""
        device = self.head.weight.device
        if isinstance(prompt, Tensor):
            if prompt.dim() not in (1, 2):
                raise ValueError(
                    f"prompt must have shape (time,) or (batch, time), got {tuple(prompt.shape)}"
                )
            prompts = list(tokens.check(torch.atleast_2d(prompt).to(device)))
        elif self.vocabulary is None:
            raise ValueError(
                "a model without a vocabulary continues tokens, not text; give CharLSTM a "
                "vocabulary, or pass the prompt as tokens"
            )
        else:
            texts = [prompt] if isinstance(prompt, str) else prompt
            prompts = [self.vocabulary.encode(text).to(device) for text in texts]
        if not prompts or any(len(one) == 0 for one in prompts):
            raise ValueError("prompt must have at least one token, got an empty one")
        return prompts

    def _continue(
        self,
        prompts: list[Tensor],
        length: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        streaming: bool,
    ) -> Iterator[Tensor]:
        """Yield tokens (B, n) until there are `length` of them. The training mode is kept."""
        size = _PIECE if streaming else _MOST_AT_ONCE
        chunks = [min(size, length - done) for done in range(0, length, size)]
        pieces = continue_tokens(
            self.lstm, self.head, self.embedding, prompts, sampling, generator, chunks
        )
        while True:
            training = [module for module in self.modules() if module.training]
            for module in training:
                module.training = False
            try:
                with torch.inference_mode():
                    piece = next(pieces, None)
            finally:
                for module in training:
                    module.training = True
            if piece is None:
                return
            yield piece.clone()


class _Text:
    """A continuation that grows until `stop` occurs in it."""

    def __init__(self, vocabulary: Vocabulary, stop: str | None) -> None:
        self.vocabulary = vocabulary
        self.stop = stop
        self.latest: Tensor | None = None  # the last token (1,), if there is one
        self.text = ""  # the final part of the text
        self.pending = ""  # the end of the text, which may be the beginning of `stop`
        self.stopped = False

    def add(self, tokens: Tensor) -> str:
        """Append tokens (n,); return the new final part of the text."""
        if self.stopped:
            return ""
        piece = self._decode(tokens)
        if self.stop is None:
            return self._accept(piece)
        self.pending += piece
        found = self.pending.find(self.stop)
        if found >= 0:
            self.stopped = True
            certain, self.pending = self.pending[:found], ""
        else:
            kept = len(self.stop) - 1
            cut = max(0, len(self.pending) - kept)
            certain, self.pending = self.pending[:cut], self.pending[cut:]
        return self._accept(certain)

    def _decode(self, tokens: Tensor) -> str:
        """The text that the tokens add, including a separator after the previous token."""
        if self.latest is None:
            piece = self.vocabulary.decode(tokens)
        else:
            whole = self.vocabulary.decode(torch.cat([self.latest, tokens]))
            piece = whole[len(self.vocabulary.decode(self.latest)) :]
        self.latest = tokens[-1:]
        return piece

    def end(self) -> str:
        """End the text; return the part that was pending."""
        certain, self.pending = self.pending, ""
        return self._accept(certain)

    def _accept(self, certain: str) -> str:
        self.text += certain
        return certain


def _check_stop(vocabulary: Vocabulary, stop: str) -> None:
    """Raise TextError if the vocabulary's `decode` can never write the stop text."""
    special = filter(None, (vocabulary.unknown, vocabulary.padding, *vocabulary.special))
    pattern = "|".join(map(re.escape, special))
    for part in re.split(pattern, stop) if pattern else [stop]:
        if part in vocabulary:
            continue
        written = vocabulary.decode(vocabulary.encode(part))
        if part.strip(" ") not in written:
            raise TextError(
                f"the stop {stop!r} cannot occur: the vocabulary writes {part!r} as {written!r}"
            )
