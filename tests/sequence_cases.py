"""What the tests of sequences share: modules, inputs, and ways to call."""

import pytest
import torch
from test_modules import EXPECT_FUSED, LAYERS, pair, random_state, tensors
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

T, B = 6, 4
LENGTHS = torch.tensor([3, 6, 1, 5])
BACKENDS = [None, "reference", *(["fused"] if EXPECT_FUSED else [])]
OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "recompute": True},
]

modes = pytest.mark.parametrize("mode", LAYERS)
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
backends = pytest.mark.parametrize("backend", BACKENDS)
ways = pytest.mark.parametrize("way", ["short", "general"])


class Watched(TorchDispatchMode):
    """A mode that sees every operator, and so keeps calls from taking the short path."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def two(mode, options, backend=None, dtype=torch.float64):
    """Returns torch.nn's module and rnnfast's, with the same weights."""
    own = dict(options)
    recompute = own.pop("recompute", False)
    theirs, ours = pair(mode, backend=backend, dtype=dtype, **own)
    ours.recompute = recompute
    return theirs, ours


def sample(mode, options, dtype=torch.float64):
    """Returns x of T steps and B sequences in the module's layout, and a state."""
    shape = (B, T, 3) if options.get("batch_first") else (T, B, 3)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    return x, random_state(mode, rows, B, 4, dtype=dtype)


def with_gradients(call, inputs, module):
    """Returns the results of ``call``, and gradients of a loss that weights them differently."""
    results = tensors(call())
    loss = sum((i + 1) * result.sin().sum() for i, result in enumerate(results))
    return [*results, *torch.autograd.grad(loss, [*inputs, *module.parameters()])]


def padded(module, x, hx, lengths):
    """Runs torch.nn's module the usual way: pack, run, pad."""
    first = module.batch_first
    packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    y, finals = module(packed, hx)
    return pad_packed_sequence(y, first, total_length=T)[0], finals
