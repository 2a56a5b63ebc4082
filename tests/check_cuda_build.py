"""Checks an installed CUDA build on a machine without a GPU (`make cuda-build`)."""

import torch

import rnnfast
from rnnfast import _C

OPS = [
    name + suffix
    for name in ("elman_tanh", "elman_relu", "gru", "lstm")
    for suffix in ("", "_backward")
]


def main() -> None:
    built = _C.built_with()
    assert built["cuda"], f"rnnfast._C was built without CUDA: {built}"
    for op in OPS:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rnnfast::{op}", key), (op, key)
    print(f"{rnnfast.__file__}: {len(OPS)} ops have CPU and CUDA kernels; {built}")


if __name__ == "__main__":
    main()
