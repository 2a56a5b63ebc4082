"""What other processes do in test_custom_modules."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def run(module: nn.Module, x: torch.Tensor, results: Any) -> None:
    """Puts the output of a module for an input into a queue."""
    results.put(module(x)[0].detach().numpy())


def main(file: str) -> None:
    """Runs the modules of a file of torch.save on the inputs beside them."""
    assert "custom_steps" not in sys.modules  # so the functions are not here
    for module, given, expected in torch.load(file, weights_only=False):
        torch.testing.assert_close(module(given), expected, rtol=0, atol=0)
        module(given)[0].sum().backward()
        assert all(weight.grad is not None for weight in module.parameters())
    assert "custom_steps" not in sys.modules
    without_extension = sys.modules.get("rnnfast._C", "") is None
    print("reference" if without_extension else "kernels")


if __name__ == "__main__":
    main(sys.argv[1])
