"""Drop-in RNN, LSTM, GRU and their cells.

They take the arguments of torch.nn's modules of the same names, have the same parameters, initial
values and ``state_dict``, and return the same results. `rnnfast.bases` says how a call runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import functional
from .bases import Device, LayersOneState, LayersTwoStates
from .cells import GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class RNN(LayersOneState):
    """Elman layers; a drop-in replacement of torch.nn.RNN.

    Each layer computes for every step t of a sequence::

        h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    x_t is the input and h_t the hidden state of step t. With ``nonlinearity="relu"``, max(0, .)
    takes the place of tanh. These are the formulas of torch.nn.RNN: Elman, "Finding structure in
    time", Cognitive Science 14, 1990; for relu Le, Jaitly and Hinton, arXiv:1504.00941.

    The constructor, the parameters with their initial values, the ``state_dict``, the results
    and the errors are those of torch.nn.RNN. The arguments ``recompute``, ``tokens`` and
    ``backend``, and ``lengths``, ``reset`` and ``embedding`` of a call, are additions.

    Sizes: T time steps, B batch, I input features, H hidden features, L layers, D directions (2 if
    bidirectional, else 1).

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the hidden state.
        num_layers: L, the number of layers. Each layer reads the outputs of the layer below.
            Default: 1.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        bias: Whether the layers have the biases b_ih and b_hh. Default: True.
        batch_first: Whether inputs and outputs are (B, T, features), not (T, B, features). States
            keep their shape. Default: False.
        dropout: The probability of zeroing an output of any layer but the last, in training.
            Default: 0.
        bidirectional: Whether each layer also runs from the end of the sequence to its start.
            Default: False.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        recompute: Whether to save no gates for the backward, which computes them again. It takes
            less memory and more time. It only has an effect on the fused kernels on the CPU. The
            attribute of the same name may be set at any time. Default: False.
        tokens: Whether inputs are integers from 0 to I - 1, each of which stands for a one-hot
            vector. The vectors are not written out. Default: False.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a
            torch.nn.utils.rnn.PackedSequence. With ``tokens`` or ``embedding``: integers of the
            same shape without its last dimension.
        hx: The initial state h_0 (L*D, B, H), or (L*D, H) for a single sequence. Default: None,
            zeros.
        lengths: How many steps each sequence of a batch has: integers (B) from 0 to T, in any
            order, on any device. Outputs beyond the end of a sequence are zeros, and its final
            state is the one after its last step. Default: None, all have T steps.
        reset: Booleans (T, B), (B, T) with ``batch_first``, or (T) for a single sequence. Where
            ``reset[t]`` is true, the state is set to zeros before step t, and no gradient passes.
            If bidirectional, nothing passes from step t back to t - 1 either. Default: None.
        embedding: A torch.nn.Embedding (V, I). If given, ``input`` holds integers from 0 to V - 1.
            The result is that of ``embedding(input)`` as input, gradients included, but W_ih is
            multiplied with each vector once, however often its token occurs. Default: None.

    Outputs:
        output: The hidden state of every step of the last layer: (T, B, D*H), (B, T, D*H) with
            ``batch_first``, (T, D*H) for a single sequence, or a PackedSequence. If bidirectional,
            the first H features are those of the forward direction.
        h_n: The final state of each layer and direction, shaped like h_0.

    Weights:
        weight_ih_l[k]: W_ih of layer k: (H, I) for k = 0, else (H, D*H).
        weight_hh_l[k]: W_hh of layer k: (H, H).
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh of layer k: (H).

    The names of the backward direction end in ``_reverse``. All are drawn from the uniform
    distribution between -1/sqrt(H) and 1/sqrt(H).

    Raises:
        ValueError: An argument is out of range, or ``backend`` is unknown. Of a call: a length is
            out of range, both ``tokens`` and ``embedding`` are used, or ``return_cells`` is true,
            which only `LSTM` supports.
        TypeError: An argument has another type. Of a call: lengths or tokens are no integers, or
            ``reset`` holds no booleans.
        IndexError: Of a call: a token is out of range.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> layer = rnnfast.RNN(10, 20, num_layers=2)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> output, h_n = layer(x)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> output, h_n = layer(x, lengths=[5, 2, 4])  # of unequal length
        >>> output[2:, 1].count_nonzero().item()
        0
    """

    torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        functional.elman(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


class LSTM(LayersTwoStates):
    """Long short-term memory (LSTM) layers; a drop-in replacement of torch.nn.LSTM.

    Each layer computes for every step t of a sequence::

        i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
        f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
        o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * tanh(c_t)

    x_t is the input, h_t the hidden state and c_t the cell state of step t. i_t, f_t, g_t and o_t
    are the input gate, the forget gate, the candidate and the output gate, and ``*`` multiplies
    elementwise. These are the formulas of torch.nn.LSTM: Hochreiter and Schmidhuber, "Long
    short-term memory", Neural Computation 9(8), 1997, with the forget gate of Gers, Schmidhuber and
    Cummins, Neural Computation 12(10), 2000. With ``proj_size`` P > 0 the hidden state is
    projected, h_t = W_hr (o_t * tanh(c_t)), as by Sak, Senior and Beaufays, arXiv:1402.1128.

    The constructor, the parameters with their initial values, the ``state_dict``, the results
    and the errors are those of torch.nn.LSTM. The arguments ``recompute``, ``tokens`` and
    ``backend``, and ``lengths``, ``reset``, ``return_cells`` and ``embedding`` of a call, are
    additions.

    Sizes: T time steps, B batch, I input features, H hidden features, L layers, D directions (2 if
    bidirectional, else 1), P features of the hidden state (``proj_size``, or H if that is 0).

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the hidden state.
        num_layers: L, the number of layers. Each layer reads the outputs of the layer below.
            Default: 1.
        bias: Whether the layers have the biases b_ih and b_hh. Default: True.
        batch_first: Whether inputs and outputs are (B, T, features), not (T, B, features). States
            keep their shape. Default: False.
        dropout: The probability of zeroing an output of any layer but the last, in training.
            Default: 0.
        bidirectional: Whether each layer also runs from the end of the sequence to its start.
            Default: False.
        proj_size: P, the size to which the hidden state is projected, less than H, or 0 for no
            projection. Default: 0.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        recompute: Whether to save no gates for the backward, which computes them again. It takes
            less memory and more time. It only has an effect on the fused kernels on the CPU. The
            attribute of the same name may be set at any time. Default: False.
        tokens: Whether inputs are integers from 0 to I - 1, each of which stands for a one-hot
            vector. The vectors are not written out. Default: False.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a
            torch.nn.utils.rnn.PackedSequence. With ``tokens`` or ``embedding``: integers of the
            same shape without its last dimension.
        hx: The initial states (h_0, c_0): h_0 (L*D, B, P) and c_0 (L*D, B, H), without B for a
            single sequence. Default: None, zeros.
        lengths: How many steps each sequence of a batch has: integers (B) from 0 to T, in any
            order, on any device. Outputs beyond the end of a sequence are zeros, and its final
            state is the one after its last step. Default: None, all have T steps.
        reset: Booleans (T, B), (B, T) with ``batch_first``, or (T) for a single sequence. Where
            ``reset[t]`` is true, the state is set to zeros before step t, and no gradient passes.
            If bidirectional, nothing passes from step t back to t - 1 either. Default: None.
        return_cells: Whether to return the cell state c of every step as well. Default: False.
        embedding: A torch.nn.Embedding (V, I). If given, ``input`` holds integers from 0 to V - 1.
            The result is that of ``embedding(input)`` as input, gradients included, but W_ih is
            multiplied with each vector once, however often its token occurs. Default: None.

    Outputs:
        output: The hidden state of every step of the last layer: (T, B, D*P), (B, T, D*P) with
            ``batch_first``, (T, D*P) for a single sequence, or a PackedSequence. If bidirectional,
            the first P features are those of the forward direction.
        (h_n, c_n): The final states of each layer and direction, shaped like (h_0, c_0).
        cells: Only with ``return_cells``. The cell state of every step of the last layer, arranged
            like ``output``, with D*H features.

    Weights:
        weight_ih_l[k]: W_ih of layer k: (4*H, I) for k = 0, else (4*H, D*P).
        weight_hh_l[k]: W_hh of layer k: (4*H, P).
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh of layer k: (4*H).
        weight_hr_l[k]: W_hr of layer k: (P, H). Only with ``proj_size``.

    The names of the backward direction end in ``_reverse``. All are drawn from the uniform
    distribution between -1/sqrt(H) and 1/sqrt(H). The rows of the weights and biases are those of
    i, f, g and o, in this order: W_ih holds W_ii, W_if, W_ig and W_io, one below the other.

    Raises:
        ValueError: An argument is out of range, or ``backend`` is unknown. Of a call: a length is
            out of range, or both ``tokens`` and ``embedding`` are used.
        TypeError: An argument has another type. Of a call: lengths or tokens are no integers, or
            ``reset`` holds no booleans.
        IndexError: Of a call: a token is out of range.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> layer = rnnfast.LSTM(10, 20, num_layers=2)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> output, (h_n, c_n) = layer(x)
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> output, (h_n, c_n) = layer(x, lengths=[5, 2, 4])  # of unequal length
        >>> output[2:, 1].count_nonzero().item()
        0
        >>> output, (h_n, c_n), cells = layer(x, return_cells=True)
        >>> torch.equal(cells[-1], c_n[1])  # the last step of the last layer
        True

    Tokens in place of vectors:

        >>> layer, embedding = rnnfast.LSTM(10, 20), torch.nn.Embedding(1000, 10)
        >>> tokens = torch.randint(1000, (5, 3))
        >>> output, _ = layer(tokens, embedding=embedding)  # as layer(embedding(tokens))
        >>> reader = rnnfast.LSTM(1000, 20, tokens=True)  # reads one-hot vectors
        >>> output, _ = reader(tokens)
    """

    torch_class = nn.LSTM

    # torch.nn's forward calls these on self. Their types differ from those of RNNBase, hence Any.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


class GRU(LayersOneState):
    """Gated recurrent unit (GRU) layers; a drop-in replacement of torch.nn.GRU.

    Each layer computes for every step t of a sequence::

        r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
        z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_{t-1}

    x_t is the input and h_t the hidden state of step t. r_t, z_t and n_t are the reset gate, the
    update gate and the candidate state, and ``*`` multiplies elementwise. These are the formulas of
    torch.nn.GRU: Cho et al., arXiv:1406.1078, with the reset gate applied after the product with
    W_hn.

    The constructor, the parameters with their initial values, the ``state_dict``, the results
    and the errors are those of torch.nn.GRU. The arguments ``recompute``, ``tokens`` and
    ``backend``, and ``lengths``, ``reset`` and ``embedding`` of a call, are additions.

    Sizes: T time steps, B batch, I input features, H hidden features, L layers, D directions (2 if
    bidirectional, else 1).

    Args:
        input_size: I, the number of features of an input.
        hidden_size: H, the number of features of the hidden state.
        num_layers: L, the number of layers. Each layer reads the outputs of the layer below.
            Default: 1.
        bias: Whether the layers have the biases b_ih and b_hh. Default: True.
        batch_first: Whether inputs and outputs are (B, T, features), not (T, B, features). States
            keep their shape. Default: False.
        dropout: The probability of zeroing an output of any layer but the last, in training.
            Default: 0.
        bidirectional: Whether each layer also runs from the end of the sequence to its start.
            Default: False.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        recompute: Whether to save no gates for the backward, which computes them again. It takes
            less memory and more time. It only has an effect on the fused kernels on the CPU. The
            attribute of the same name may be set at any time. Default: False.
        tokens: Whether inputs are integers from 0 to I - 1, each of which stands for a one-hot
            vector. The vectors are not written out. Default: False.
        backend: "fused", "aten", "reference" or "auto" to force what runs the calls, or None for
            `rnnfast.use_backend` or the default; see `rnnfast.backend`. Default: None.

    Inputs:
        input: (T, B, I), (B, T, I) with ``batch_first``, (T, I) for a single sequence, or a
            torch.nn.utils.rnn.PackedSequence. With ``tokens`` or ``embedding``: integers of the
            same shape without its last dimension.
        hx: The initial state h_0 (L*D, B, H), or (L*D, H) for a single sequence. Default: None,
            zeros.
        lengths: How many steps each sequence of a batch has: integers (B) from 0 to T, in any
            order, on any device. Outputs beyond the end of a sequence are zeros, and its final
            state is the one after its last step. Default: None, all have T steps.
        reset: Booleans (T, B), (B, T) with ``batch_first``, or (T) for a single sequence. Where
            ``reset[t]`` is true, the state is set to zeros before step t, and no gradient passes.
            If bidirectional, nothing passes from step t back to t - 1 either. Default: None.
        embedding: A torch.nn.Embedding (V, I). If given, ``input`` holds integers from 0 to V - 1.
            The result is that of ``embedding(input)`` as input, gradients included, but W_ih is
            multiplied with each vector once, however often its token occurs. Default: None.

    Outputs:
        output: The hidden state of every step of the last layer: (T, B, D*H), (B, T, D*H) with
            ``batch_first``, (T, D*H) for a single sequence, or a PackedSequence. If bidirectional,
            the first H features are those of the forward direction.
        h_n: The final state of each layer and direction, shaped like h_0.

    Weights:
        weight_ih_l[k]: W_ih of layer k: (3*H, I) for k = 0, else (3*H, D*H).
        weight_hh_l[k]: W_hh of layer k: (3*H, H).
        bias_ih_l[k], bias_hh_l[k]: b_ih and b_hh of layer k: (3*H).

    The names of the backward direction end in ``_reverse``. All are drawn from the uniform
    distribution between -1/sqrt(H) and 1/sqrt(H). The rows of the weights and biases are those of
    r, z and n, in this order: W_ih holds W_ir, W_iz and W_in, one below the other.

    Raises:
        ValueError: An argument is out of range, or ``backend`` is unknown. Of a call: a length is
            out of range, both ``tokens`` and ``embedding`` are used, or ``return_cells`` is true,
            which only `LSTM` supports.
        TypeError: An argument has another type. Of a call: lengths or tokens are no integers, or
            ``reset`` holds no booleans.
        IndexError: Of a call: a token is out of range.
        RuntimeError: Of a call: shapes, dtypes or devices do not fit, in torch.nn's words, or a
            forced backend cannot run.

    Example:
        >>> layer = rnnfast.GRU(10, 20, num_layers=2)
        >>> x = torch.randn(5, 3, 10)  # 5 steps of 3 sequences
        >>> output, h_n = layer(x)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> output, h_n = layer(x, lengths=[5, 2, 4])  # of unequal length
        >>> output[2:, 1].count_nonzero().item()
        0
    """

    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        tokens: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_projection(kwargs)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            recompute=recompute,
            tokens=tokens,
            backend=backend,
            **kwargs,
        )


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
