"""Known recurrent cells, made with `rnnfast.cell`, for `rnnfast.Layer` and `rnnfast.LayerCell`.

    from rnnfast.custom.library import slstm
    layer = rnnfast.Layer(slstm, input_size=10, hidden_size=20)

Every function below says what its cell computes and where that comes from. The gates are named in
the order of the blocks of rows of W_ih, W_hh and the biases. In a formula, an index names the
block, ``W_a`` stands for ``W_ia x + b_ia + W_ha h + b_ha``, ``X_a`` for ``W_ia x + b_ia`` alone,
and a prime for the state after the step. States are zeros where none are given.

======================  =======  ==========  ===============  =============================
Cell                    Gates    States      Parameters       From
======================  =======  ==========  ===============  =============================
``peephole_lstm``       i f g o  h, c        p_i, p_f, p_o    Gers et al., JMLR 3, 2002
``coupled_lstm``        f g o    h, c                         Greff et al., arXiv:1503.04069
``hard_lstm``           i f g o  h, c                         Keras up to 2.2
``layer_norm_lstm``     i f g o  h, c        (of the norm)    after Ba et al., arXiv:1607.06450
``slstm``               i f z o  h, c, n, m                   Beck et al., arXiv:2405.04517
``janet``               f g      h                            arXiv:1804.04849
``ugrnn``               g c      h                            Collins et al., arXiv:1611.09913
``light_gru``           a z      h                            Ravanelli et al., arXiv:1803.10225
``layer_norm_gru``      r n z    h           (of the norm)    Hafner et al., arXiv:2010.02193
``min_gru``             z n      h                            Feng et al., arXiv:2410.01201
``min_lstm``            f i n    h                            Feng et al., arXiv:2410.01201
``ind_rnn``             a        h           u                Li et al., arXiv:1803.04831
``sru``                 g f r x  h, c        v_f, v_r         Lei et al., arXiv:1709.02755
``qrnn``                z f o    h, c                         Bradbury et al., arXiv:1611.01576
``zoneout_lstm(...)``   i f g o  h, c                         Krueger et al., arXiv:1606.01305
======================  =======  ==========  ===============  =============================

``min_gru``, ``min_lstm``, ``ind_rnn``, ``sru`` and ``qrnn`` have no W_hh.

The GRU of Cho et al. (arXiv:1406.1078v3), which is that of Keras with ``reset_after=False``, and
the minimal gated unit (Zhou et al., arXiv:1603.09420) multiply h by a gate before W_hh does. No
such cell can be written: W_hh multiplies the h of the step before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import CustomCell, cell


@cell(gates=4, state=("h", "c"), parameters={"p_i": 0.0, "p_f": 0.0, "p_o": 0.0})
def peephole_lstm(x: Any, h: Any, state: Any, parameters: Any) -> Any:
    """LSTM whose gates see c, gate order i, f, g, o. p_i, p_f and p_o are the peepholes.

    i  = sigmoid(W_i + p_i * c)
    f  = sigmoid(W_f + p_f * c)
    c' = f * c + i * tanh(W_g)
    o  = sigmoid(W_o + p_o * c')
    h' = o * tanh(c')

    Gers, Schraudolph, Schmidhuber, "Learning precise timing with LSTM recurrent networks", JMLR 3,
    2002, with tanh for both squashing functions as Greff et al., arXiv:1503.04069, write it. With
    peepholes of zero, their first values, it is an LSTM.
    """
    i = torch.sigmoid(x[0] + h[0] + parameters.p_i * state.c)
    f = torch.sigmoid(x[1] + h[1] + parameters.p_f * state.c)
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    o = torch.sigmoid(x[3] + h[3] + parameters.p_o * c)
    return o * torch.tanh(c), c


@cell(gates=3, state=("h", "c"))
def coupled_lstm(x: Any, h: Any, state: Any) -> Any:
    """LSTM whose input gate is 1 - f, gate order f, g, o.

    f  = sigmoid(W_f)
    c' = f * c + (1 - f) * tanh(W_g)
    h' = sigmoid(W_o) * tanh(c')

    Variant CIFG of Greff, Srivastava, Koutnik, Steunebrink, Schmidhuber, "LSTM: A search space
    odyssey", arXiv:1503.04069, without their peepholes. They write f = 1 - i; that is this cell
    with the other sign of the weights and biases of f.
    """
    f = torch.sigmoid(x[0] + h[0])
    c = f * state.c + (1 - f) * torch.tanh(x[1] + h[1])
    return torch.sigmoid(x[2] + h[2]) * torch.tanh(c), c


@cell(gates=4, state=("h", "c"))
def hard_lstm(x: Any, h: Any, state: Any) -> Any:
    """LSTM with piecewise linear gates, gate order i, f, g, o, which is that of Keras.

    hard(a) = min(max(0.2 * a + 0.5, 0), 1)
    c' = hard(W_f) * c + hard(W_i) * tanh(W_g)
    h' = hard(W_o) * tanh(c')

    The LSTM of Keras 1 and 2 with ``recurrent_activation="hard_sigmoid"``, the default up to
    Keras 2.2, and of ONNX with HardSigmoid. In Keras 3 hard_sigmoid is another function,
    relu6(a + 3) / 6, which torch calls hardsigmoid. Keras transposes its weights and has one bias.
    ONNX has the order i, o, f, g.
    """

    def hard(a: Tensor) -> Tensor:
        return torch.clamp(0.2 * a + 0.5, 0, 1)

    i, f, o = (hard(x[k] + h[k]) for k in (0, 1, 3))
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    return o * torch.tanh(c), c


@cell(gates=4, state=("h", "c"), norm="layer")
def layer_norm_lstm(gates: Any, state: Any) -> Any:
    """LSTM with normalised gates, gate order i, f, g, o; eps is 1e-5.

    i, f, g, o = LayerNorm([W_i, W_f, W_g, W_o]), over all 4 H numbers
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(c')

    After Ba, Kiros, Hinton, "Layer normalization", arXiv:1607.06450. They normalise W_ih x and
    W_hh h each by itself, and c' before its tanh. Here their sum is normalised once, and c' is not.
    """
    i, f, g, o = gates
    c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


@cell(gates=4, state=("h", "c", "n", "m"))
def slstm(x: Any, h: Any, state: Any) -> Any:
    """Cell of xLSTM with exponential input gate, gate order i, f, z, o.

    m' = max(log sigmoid(W_f) + m, W_i), or W_i in a first step, where n is 0
    i  = exp(W_i - m')
    f  = exp(log sigmoid(W_f) + m - m')
    c' = f * c + i * tanh(W_z)
    n' = f * n + i
    h' = sigmoid(W_o) * c' / n'

    Beck et al., "xLSTM: Extended long short-term memory", arXiv:2405.04517, with the sigmoid forget
    gate; order and first step are those of their program. m keeps exp from overflow and has no
    other effect: c and n are the paper's, divided by exp(m). W_hh is a full matrix, which is one
    head. Several heads are a W_hh whose four blocks are block-diagonal.
    """
    i, kept = x[0] + h[0], F.logsigmoid(x[1] + h[1]) + state.m
    m = torch.where(state.n == 0, i, torch.maximum(kept, i))
    i, f = torch.exp(i - m), torch.exp(torch.minimum(kept - m, torch.zeros_like(m)))
    c = f * state.c + i * torch.tanh(x[2] + h[2])
    n = f * state.n + i
    return torch.sigmoid(x[3] + h[3]) * c / n, c, n, m


@cell(gates=2)
def janet(x: Any, h: Any, state: Any) -> Any:
    """LSTM with the forget gate alone, gate order f, g.

    h' = sigmoid(W_f) * h + (1 - sigmoid(W_f - 1)) * tanh(W_g)

    Van der Westhuizen, Lasenby, "The unreasonable effectiveness of the forget gate",
    arXiv:1804.04849, with their beta = 1. They begin with b_g = 0 and b_f = log u, where u is
    uniform between 1 and the longest dependency in steps. `rnnfast.Layer` does not.
    """
    f = x[0] + h[0]
    g = torch.tanh(x[1] + h[1])
    return torch.sigmoid(f) * state.h + (1 - torch.sigmoid(f - 1)) * g


@cell(gates=2)
def ugrnn(x: Any, h: Any, state: Any) -> Any:
    """Update gate RNN, gate order g, c.

    g  = sigmoid(W_g)
    h' = g * h + (1 - g) * tanh(W_c)

    Collins, Sohl-Dickstein, Sussillo, "Capacity and trainability in recurrent neural networks",
    arXiv:1611.09913. ``UGRNNCell`` of TensorFlow 1 adds 1 to W_g: add it to a bias.
    """
    g = torch.sigmoid(x[0] + h[0])
    return g * state.h + (1 - g) * torch.tanh(x[1] + h[1])


@cell(gates=2)
def light_gru(x: Any, h: Any, state: Any) -> Any:
    """GRU without reset gate and with relu, gate order a, z.

    z  = sigmoid(W_z)
    h' = z * h + (1 - z) * relu(W_a)

    Ravanelli, Brakel, Omologo, Bengio, "Light gated recurrent units for speech recognition",
    arXiv:1803.10225; the order is that of ``LiGRU`` in SpeechBrain. Both normalise W_ih x over the
    batch. In evaluation that is a scale of the rows of W_ih and a bias, and can be folded in.
    SpeechBrain has no bias_hh, and one set of weights for both directions.
    """
    z = torch.sigmoid(x[1] + h[1])
    return z * state.h + (1 - z) * torch.relu(x[0] + h[0])


@cell(gates=3, norm="layer", eps=1e-3)
def layer_norm_gru(gates: Any, state: Any) -> Any:
    """GRU of Dreamer, gate order r, n, z: reset, candidate, update; eps is 1e-3.

    r, n, z = LayerNorm([W_r, W_n, W_z]), over all 3 H numbers
    z  = sigmoid(z - 1)
    h' = z * tanh(sigmoid(r) * n) + (1 - z) * h

    ``GRUCell`` in the program of Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with discrete
    world models", arXiv:2010.02193, and in ports of DreamerV3 to PyTorch. They have one matrix for
    [x, h]: its first columns are W_ih, and the others W_hh. The ports have no bias.
    """
    r, n, z = gates
    z = torch.sigmoid(z - 1)
    return z * torch.tanh(torch.sigmoid(r) * n) + (1 - z) * state.h


def _positive(a: Tensor) -> Tensor:
    """The function g of Feng et al.: a + 0.5 from 0 on, and sigmoid(a) below."""
    return torch.where(a >= 0, a + 0.5, torch.sigmoid(a))


@cell(gates=2, recurrent=False)
def min_gru(x: Any, state: Any) -> Any:
    """GRU whose gates depend on x alone, gate order z, n.

    z  = sigmoid(X_z)
    h' = (1 - z) * h + z * g(X_n), where g(a) = a + 0.5 for a >= 0, and else sigmoid(a)

    Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs all we needed?", arXiv:2410.01201: the
    version whose states are positive, which they compute in log space.
    """
    z = torch.sigmoid(x[0])
    return (1 - z) * state.h + z * _positive(x[1])


@cell(gates=3, recurrent=False)
def min_lstm(x: Any, state: Any) -> Any:
    """LSTM whose gates depend on x alone, gate order f, i, n.

    f, i = sigmoid(X_f), sigmoid(X_i)
    h' = f / (f + i) * h + i / (f + i) * g(X_n), with the g of `min_gru`

    Feng et al., arXiv:2410.01201, as for `min_gru`. It has one state. f / (f + i) is computed from
    logarithms, since both can be too small to divide by.
    """
    f = torch.sigmoid(F.logsigmoid(x[0]) - F.logsigmoid(x[1]))
    return f * state.h + (1 - f) * _positive(x[2])


@cell(gates=1, parameters={"u": 1.0}, recurrent=False)
def ind_rnn(x: Any, state: Any, parameters: Any) -> Any:
    """RNN whose units see their own past alone. u has the recurrent weights, one for each unit.

    h' = relu(X + u * h)

    Li, Li, Cook, Zhu, Gao, "Independently recurrent neural network (IndRNN)", arXiv:1803.04831.
    They keep each abs(u) below a bound, 2 ** (1 / steps) for example: clamp it after each step of
    the optimiser. u begins with 1.
    """
    return torch.relu(x[0] + parameters.u * state.h)


@cell(gates=4, state=("h", "c"), parameters={"v_f": 0.0, "v_r": 0.0}, recurrent=False)
def sru(x: Any, state: Any, parameters: Any) -> Any:
    """Simple recurrent unit, gate order g, f, r, x. v_f and v_r are its recurrent weights.

    f  = sigmoid(X_f + v_f * c)
    r  = sigmoid(X_r + v_r * c)
    c' = f * c + (1 - f) * X_g
    h' = r * c' + (1 - r) * X_x

    Lei, Zhang, Wang, Dai, Artzi, "Simple recurrent units for highly parallelizable recurrence",
    arXiv:1709.02755. Their X_g has no bias. In place of X_x they have the input itself, times a
    constant alpha, where it has H numbers: set that block of W_ih to alpha times the identity
    and its bias to 0.
    """
    f = torch.sigmoid(x[1] + parameters.v_f * state.c)
    r = torch.sigmoid(x[2] + parameters.v_r * state.c)
    c = f * state.c + (1 - f) * x[0]
    return r * c + (1 - r) * x[3], c


@cell(gates=3, state=("h", "c"), recurrent=False)
def qrnn(x: Any, state: Any) -> Any:
    """Quasi-recurrent network with fo-pooling, gate order z, f, o.

    f  = sigmoid(X_f)
    c' = f * c + (1 - f) * tanh(X_z)
    h' = sigmoid(X_o) * c'

    Bradbury, Merity, Xiong, Socher, "Quasi-recurrent neural networks", arXiv:1611.01576. For a
    window of k steps, give [x_(t-k+1), ..., x_t] as the input of step t.
    """
    f = torch.sigmoid(x[1])
    c = f * state.c + (1 - f) * torch.tanh(x[0])
    return torch.sigmoid(x[2]) * c, c


def zoneout_lstm(zoneout_h: float, zoneout_c: float) -> CustomCell:
    """Returns an LSTM with zoneout as it is in evaluation, gate order i, f, g, o.

    h', c' = lstm(x, h, c)
    h'' = zoneout_h * h + (1 - zoneout_h) * h'
    c'' = zoneout_c * c + (1 - zoneout_c) * c'

    Krueger et al., "Zoneout: Regularizing RNNs by randomly preserving hidden activations",
    arXiv:1606.01305. In training each unit keeps its old state at random. That is not possible
    here: a cell has no random numbers, and a step has no inputs but the gates. Training such a cell
    works, with the mean in place of the random choice.

    Args:
        zoneout_h: The probability that a unit of h keeps its state.
        zoneout_c: The same for c.

    Raises:
        ValueError: A probability is not between 0 and 1.
    """
    for name, value in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} should be a probability between 0 and 1, got {value}")

    @cell(gates=4, state=("h", "c"))
    def zoneout_lstm(x: Any, h: Any, state: Any) -> Any:
        i, f, o = (torch.sigmoid(x[k] + h[k]) for k in (0, 1, 3))
        c = f * state.c + i * torch.tanh(x[2] + h[2])
        new_h = zoneout_h * state.h + (1 - zoneout_h) * (o * torch.tanh(c))
        return new_h, zoneout_c * state.c + (1 - zoneout_c) * c

    return zoneout_lstm


__all__ = [
    "coupled_lstm",
    "hard_lstm",
    "ind_rnn",
    "janet",
    "layer_norm_gru",
    "layer_norm_lstm",
    "light_gru",
    "min_gru",
    "min_lstm",
    "peephole_lstm",
    "qrnn",
    "slstm",
    "sru",
    "ugrnn",
    "zoneout_lstm",
]
