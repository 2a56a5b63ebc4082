"""A language model over characters or words: embedding, LSTM layers, linear head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rnnfast import tokens
from rnnfast.generation import Sampling, continue_tokens
from rnnfast.models.results import as_step, pair
from rnnfast.modules import LSTM
from rnnfast.text import TextError, Vocabulary

State = tuple[Tensor, Tensor]
Prompt = TypeVar("Prompt", str, list[str], Tensor)
_PIECE = 32  # tokens between two looks at what has been generated
_MOST_AT_ONCE = 4096  # so that an interrupt is noticed
_REMEDIES = {
    1: "tokens.unsqueeze(0) makes a batch of one sequence",
    3: "of one-hot vectors, the tokens are vectors.argmax(-1)",
}


class CharLSTMConfig(NamedTuple):
    """The sizes that, with a state_dict, make a CharLSTM."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    embedding_size: int
    dropout: float
    tied_weights: bool = False


class CharLSTM(nn.Module):
    """Predicts the next character from those before it, or the next word with a `WordVocabulary`.

    Sizes: B batch, T time, V vocabulary, H hidden, L layers.

    Args:
        vocab_size: V, the number of distinct tokens.
        hidden_size: H, the size of the recurrent state.
        num_layers: L, the number of LSTM layers on top of each other.
        embedding_size: the size of the vector that stands for a token; `hidden_size` if None.
        dropout: the probability of zeroing an element of what goes into the head and, with more
            than one layer, of what passes between the layers; in training only.
        tied_weights: the head's weights are the embedding's (Press, Wolf, arXiv:1608.05859), which
            needs an embedding of size H.
        backend: what runs the LSTM layers, see `rnnfast.LSTM`.
        lstm: the class of the LSTM layers: `rnnfast.LSTM`, or `torch.nn.LSTM` to compare with.
            The state_dict is the same either way.
        vocabulary: what `generate` reads and writes text with; not part of the state_dict.

    Raises:
        ValueError: a size is not positive, the dropout is no probability, tied weights do not fit,
            or the vocabulary does not have `vocab_size` symbols.
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
            self.embedding.weight = self.head.weight  # whose initial values suit both

    def forward(self, tokens: Tensor, hidden: State | None = None) -> tuple[Tensor, State]:
        """Score every possible next token after each token.

        For a loss, flatten both: ``cross_entropy(logits.flatten(0, 1), targets.flatten())``. For
        probabilities, take ``logits.softmax(-1)``, and see `generate`, which is the whole loop. A
        softmax over the axis of a single step, which would make every probability 1, raises
        ValueError.

        Args:
            tokens: int64 (B, T).
            hidden: the state h and c, each (L, B, H), from an earlier call; zeros if None.

        Returns:
            logits (B, T, V), and the state after the last token.

        Raises:
            ValueError: tokens are not two-dimensional.
        """
        if tokens.dim() != 2:
            raise ValueError(
                f"CharLSTM: expected tokens of shape (batch, time), got {tuple(tokens.shape)}; "
                f"{_REMEDIES.get(tokens.dim(), 'the numbers of the symbols, one row per sequence')}"
            )
        if isinstance(self.lstm, LSTM):
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
        """The size of the vector that stands for a token."""
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
        """Continue a prompt, one sampled token at a time; nothing is dropped out meanwhile.

        Args:
            prompt: text, or several texts, for a model with a vocabulary; or int64 tokens (T,) or
                (B, T). None may be empty.
            length: how many tokens to add.
            temperature: divides the logits: below 1 bolder guesses become rarer, above 1 more
                frequent.
            top_k: if not None, only so many of the likeliest tokens are in question.
            top_p: if not None, of these only the fewest whose probability is at least this part.
            greedy: always take the likeliest token.
            seed: makes the choices repeatable.
            generator: where the random numbers come from; torch's default generator if neither it
                nor a seed is given.
            stop: if not None, what a text ends before, once it would be continued with it: a
                symbol of the vocabulary, such as its end symbol, or text as the vocabulary's
                `decode` writes it.
            callback: if not None, is given the continuation piece by piece while it is made, in the
                kind of the prompt: a text, a list of texts, of which those that have stopped are
                empty, or tokens. The pieces joined, without anything between them, are what is
                returned.

        Returns:
            The continuation alone, in the kind of the prompt: text of `length` tokens, written by
            the vocabulary's `decode`, or, with `stop`, of fewer; a list of such; or int64 tokens
            (length,) or (B, length).

        Raises:
            TextError: prompt or stop have characters or words that the vocabulary lacks, or the
                vocabulary never writes the stop.
            TypeError: the prompt's tokens, or `top_k`, are no integers.
            IndexError: the prompt has tokens that the vocabulary lacks.
            ValueError: an empty prompt, a wrong rank, a negative length, an argument of the choice
                out of range, text for a model without a vocabulary, a stop for tokens or an empty
                one, both a seed and a generator, or logits that are not finite.
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
        """Adds to the texts until all have stopped; yields what has become certain of each."""
        for rows in pieces:
            yield [text.add(row) for text, row in zip(texts, rows, strict=True)]
            if all(text.stopped for text in texts):
                break
        held_back = [text.end() for text in texts]
        if any(held_back):
            yield held_back

    def _prompts(self, prompt: str | list[str] | Tensor) -> list[Tensor]:
        """The prompts as tokens (T,) on the model's device."""
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
        """Yields tokens (B, n) until there are `length`; leaves the training mode as it was."""
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
    """A continuation that grows, until it would go on with `stop`."""

    def __init__(self, vocabulary: Vocabulary, stop: str | None) -> None:
        self.vocabulary = vocabulary
        self.stop = stop
        self.latest: Tensor | None = None  # the last token (1,), if there is one
        self.text = ""  # what is certain
        self.pending = ""  # what may be the beginning of `stop`
        self.stopped = False

    def add(self, tokens: Tensor) -> str:
        """Append tokens (n,); returns what of the text has become certain."""
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
        """What the tokens add to the text, with what stands between them and the last one."""
        if self.latest is None:
            piece = self.vocabulary.decode(tokens)
        else:
            whole = self.vocabulary.decode(torch.cat([self.latest, tokens]))
            piece = whole[len(self.vocabulary.decode(self.latest)) :]
        self.latest = tokens[-1:]
        return piece

    def end(self) -> str:
        """There are no more pieces; returns what has become certain by that."""
        certain, self.pending = self.pending, ""
        return self._accept(certain)

    def _accept(self, certain: str) -> str:
        self.text += certain
        return certain


def _check_stop(vocabulary: Vocabulary, stop: str) -> None:
    """Raises TextError for a stop that no text of the vocabulary contains."""
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
