"""The implementations that are set beside each other.

A builder gets a torch.nn module, whose weights to take, and the input it will be given. It returns
what maps x (T, B, I) to (y, state) as torch.nn does, or raises `UnsupportedError`. A peer that
returns an nn.Module with torch.nn's parameter names is trained too; others are for inference only.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import rnnfast

Run = Callable[[Tensor], tuple[Tensor, Any]]
Builder = Callable[[nn.RNNBase, Tensor], Run]


class UnsupportedError(Exception):
    """This peer cannot run this case; the message says why."""


def build_rnnfast(module: nn.RNNBase, x: Tensor) -> nn.Module:
    twin = getattr(rnnfast, type(module).__name__)(
        module.input_size,
        module.hidden_size,
        backend="fused",
        device=x.device,
        dtype=x.dtype,
    )
    twin.load_state_dict(module.state_dict())
    return twin


def build_torch(module: nn.RNNBase, x: Tensor) -> nn.Module:
    twin = copy.deepcopy(module)
    twin.flatten_parameters()  # cuDNN wants the weights in one piece, and a copy scatters them
    return twin


PEERS: dict[str, Builder] = {"torch": build_torch}
