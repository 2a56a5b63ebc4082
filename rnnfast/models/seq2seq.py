"""Sequence-to-sequence models: an LSTM encoder and an LSTM decoder."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnnfast import checks
from rnnfast.models import beam
from rnnfast.models.beam import Decoded, beam_search
from rnnfast.modules import LSTM

State = tuple[Tensor, Tensor]


class Seq2SeqConfig(NamedTuple):
    """The arguments of a Seq2SeqLSTM that its state_dict does not contain."""

    input_vocab_size: int
    output_vocab_size: int
    hidden_size: int
    num_layers: int
    embedding_size: int
    dropout: float
    reverse_source: bool
    padding_token: int
    start_token: int
    end_token: int


class Seq2SeqLSTM(nn.Module):
    """Maps sequences to sequences of another length and vocabulary.

    The encoder reads the source x. Its final state (h, c) in every layer is the initial state of
    the decoder (Sutskever et al., 2014; Cho et al., 2014):

        P(y | x) = prod_t P(y_t | y_1, ..., y_{t-1}, x)

    y_0 is the start symbol, and the last y_t is the end symbol. In training the decoder reads the
    true symbols (teacher forcing) or its own, see `forward`.

    Sizes: B batch, S and T time of source and target, V output vocabulary, H hidden, L layers.

    Args:
        input_vocab_size: the number of distinct source symbols.
        output_vocab_size: V, the number of distinct target symbols, including the special ones.
        hidden_size: H, the size of the recurrent states.
        num_layers: L, the number of LSTM layers in the encoder and in the decoder each.
        embedding_size: the size of the embedding of a symbol; `hidden_size` if None.
        dropout: the probability of dropout, in training only, on the input of the head and, with
            more than one layer, between the layers.
        reverse_source: whether the encoder reads the source backwards. It then reads the first
            symbols of the source last, shortly before the decoder writes the first symbols of the
            target (Sutskever et al., 2014).
        padding_token: the target symbol that pads short rows; the loss ignores it.
        start_token: the target symbol that the decoder reads first.
        end_token: the target symbol that ends a sequence.
        backend: the backend of the LSTM layers, see `rnnfast.LSTM`.

    Raises:
        ValueError: a size is not positive, the dropout is not a probability, or the three special
            symbols are not distinct symbols of the output vocabulary.
    """

    def __init__(
        self,
        input_vocab_size: int,
        output_vocab_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        reverse_source: bool = False,
        padding_token: int = 0,
        start_token: int = 1,
        end_token: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embedding_size is None:
            embedding_size = hidden_size
        if min(input_vocab_size, embedding_size) < 1:
            raise ValueError(
                f"input_vocab_size and embedding_size must be greater than zero, got "
                f"{input_vocab_size} and {embedding_size}"
            )
        special = {padding_token, start_token, end_token}
        if len(special) < 3 or not 0 <= min(special) <= max(special) < output_vocab_size:
            raise ValueError(
                f"padding_token, start_token and end_token must be distinct and from 0 to "
                f"{output_vocab_size - 1}, got {padding_token}, {start_token} and {end_token}"
            )
        self.config = Seq2SeqConfig(
            input_vocab_size,
            output_vocab_size,
            hidden_size,
            num_layers,
            embedding_size,
            dropout,
            reverse_source,
            padding_token,
            start_token,
            end_token,
        )

        def layers() -> LSTM:
            return LSTM(
                embedding_size,
                hidden_size,
                num_layers,
                batch_first=True,
                dropout=dropout if num_layers > 1 else 0.0,
                device=device,
                dtype=dtype,
                backend=backend,
            )

        self.source_embedding = nn.Embedding(
            input_vocab_size, embedding_size, device=device, dtype=dtype
        )
        self.target_embedding = nn.Embedding(
            output_vocab_size, embedding_size, device=device, dtype=dtype
        )
        self.encoder = layers()
        self.decoder = layers()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, output_vocab_size, device=device, dtype=dtype)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | Sequence[int] | None = None,
        teacher_forcing_ratio: float = 1.0,
        *,
        state: State | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute the logits of every symbol of the targets.

        For symbol t the decoder reads symbol t - 1. With probability `teacher_forcing_ratio` this
        is the true symbol (teacher forcing), otherwise the symbol with the decoder's own highest
        logit (scheduled sampling; Bengio et al., 2015). The choice is made for each step and
        sequence separately, and no gradient passes through it. With a ratio of 1 the decoder runs
        once for the whole target, otherwise once for each step.

        Args:
            source: int64 (B, S).
            target: int64 (B, T) without the start symbol. Each row ends with the end symbol,
                followed by padding.
            source_lengths: integers (B) from 0 to S, the length of each source; S if None. The
                symbols after the end of a source are ignored.
            teacher_forcing_ratio: from 0 to 1.
            state: the initial state of the encoder, h and c, each (L, B, H); zeros if None.
            generator: the generator of the random choices, on the model's device; torch's default
                generator if None.

        Returns:
            logits (B, T, V); those at [:, t] belong to `target[:, t]`.

        Raises:
            ValueError: source or target is not two-dimensional, their batch sizes differ, T is 0,
                the ratio is not a probability, or a length is out of range.
            TypeError: `source_lengths` is a single number, probably a misplaced
                `teacher_forcing_ratio`.
            TypeError, RuntimeError: the errors of `rnnfast.LSTM` for the lengths and the state.
        """
        if target.dim() != 2 or target.size(1) < 1 or target.shape[:1] != source.shape[:1]:
            raise ValueError(
                f"Seq2SeqLSTM: expected targets of shape (batch, time), one step or more, for "
                f"sources of shape {tuple(source.shape)}, got {tuple(target.shape)}"
            )
        if isinstance(source_lengths, Number):
            raise TypeError(
                f"source_lengths should be integers, one for each source, got {source_lengths}; "
                f"did you mean model(source, target, teacher_forcing_ratio={source_lengths})?"
            )
        if not 0 <= teacher_forcing_ratio <= 1:
            raise ValueError(
                f"teacher_forcing_ratio must be from 0 to 1, got {teacher_forcing_ratio}"
            )
        state = self.encode(source, source_lengths, state)
        start = target.new_full((len(target), 1), self.config.start_token)
        if teacher_forcing_ratio == 1:
            return self._write(torch.cat([start, target[:, :-1]], 1), state)[0]
        chances = torch.rand(target.shape, generator=generator, device=target.device)
        latest, logits = start, []
        for truth, chance in zip(target.split(1, 1), chances.split(1, 1), strict=True):
            scores, state = self._write(latest, state)
            chosen = self._allow(scores).argmax(2)
            logits.append(scores)
            latest = truth.where(chance < teacher_forcing_ratio, chosen)
        return torch.cat(logits, 1)

    @property
    def input_vocab_size(self) -> int:
        """The number of distinct source symbols."""
        return self.config.input_vocab_size

    @property
    def output_vocab_size(self) -> int:
        """V, the number of distinct target symbols."""
        return self.config.output_vocab_size

    @property
    def hidden_size(self) -> int:
        """H, the size of the recurrent states."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """L, the number of LSTM layers in the encoder and in the decoder each."""
        return self.config.num_layers

    @property
    def embedding_size(self) -> int:
        """The size of the embedding of a symbol."""
        return self.config.embedding_size

    def init_hidden(self, batch_size: int = 1) -> State:
        """The initial state of the encoder: h and c, zeros (L, B, H) each."""
        weight = self.head.weight
        shape = (self.num_layers, batch_size, self.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean cross entropy over all target symbols (B, T) that are not padding."""
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=self.config.padding_token
        )

    def encode(
        self,
        source: Tensor,
        source_lengths: Tensor | Sequence[int] | None = None,
        state: State | None = None,
    ) -> State:
        """The state (h, c), each (L, B, H), after the last symbol of each source.

        The arguments and errors are those of `forward`.
        """
        if source.dim() != 2:
            raise ValueError(
                f"Seq2SeqLSTM: expected sources of shape (batch, time), got {tuple(source.shape)}"
            )
        lengths = checks.check_extras(source, source_lengths, None, False, True).lengths
        source = self._arrange(source, lengths)
        return self.encoder(source, state, lengths=lengths, embedding=self.source_embedding)[1]

    @torch.no_grad()
    def decode(
        self,
        source: Tensor,
        source_lengths: Tensor | Sequence[int] | None = None,
        *,
        max_length: int,
        beam_size: int = 1,
        length_penalty: float = 0.0,
        state: State | None = None,
    ) -> Decoded:
        """Write a likely target for each source, without dropout.

        The padding and start symbols are never written. With `beam_size` 1 each symbol is the
        likeliest next one (greedy search). A larger beam searches for the likeliest whole target,
        see `beam_search`.

        Args:
            source: int64 (B, S).
            source_lengths: integers (B) from 0 to S, the length of each source; S if None.
            max_length: the maximum number of symbols, including the end symbol.
            beam_size: the number of hypotheses for each source.
            length_penalty: 0 compares probabilities; larger values favour longer targets.
            state: the initial state of the encoder, h and c, each (L, B, H); zeros if None.

        Returns:
            The symbols, their lengths and their log-probabilities, see `Decoded`.

        Raises:
            ValueError: the errors of `beam_search`, and those of `forward` for the sources.
        """
        was_training = self.training
        self.eval()
        try:
            return beam_search(
                self._step,
                self.encode(source, source_lengths, state),
                start_token=self.config.start_token,
                end_token=self.config.end_token,
                padding_token=self.config.padding_token,
                beam_size=beam_size,
                max_length=max_length,
                length_penalty=length_penalty,
            )
        finally:
            self.train(was_training)

    def _arrange(self, source: Tensor, lengths: Tensor | None) -> Tensor:
        """The sources in reading order, with padding replaced by a valid symbol."""
        if lengths is None:
            return source.flip(1) if self.config.reverse_source else source
        lengths = lengths.to(source.device).unsqueeze(1)
        place = torch.arange(source.size(1), device=source.device)
        padding = place >= lengths
        if self.config.reverse_source:
            source = source.gather(1, (lengths - 1 - place).where(~padding, place))
        return source.masked_fill(padding, 0)

    def _write(self, tokens: Tensor, state: beam.State) -> tuple[Tensor, State]:
        """The logits (B, T, V) after each of the tokens (B, T) that the decoder reads."""
        h, c = state
        y, final = self.decoder(tokens, (h, c), embedding=self.target_embedding)
        return self.head(self.dropout(y)), final

    def _step(self, latest: Tensor, state: beam.State) -> tuple[Tensor, State]:
        """The log-probabilities (N, V) of the next symbols, given the latest ones (N,)."""
        logits, state = self._write(latest.unsqueeze(1), state)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return self._allow(logits.squeeze(1).log_softmax(1, dtype)), state

    def _allow(self, scores: Tensor) -> Tensor:
        """Set the scores (..., V) of the padding and start symbols to -inf."""
        never = [self.config.padding_token, self.config.start_token]
        places = torch.tensor(never, dtype=torch.int64, device=scores.device)
        return scores.index_fill(-1, places, -torch.inf)
