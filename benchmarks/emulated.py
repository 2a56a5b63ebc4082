"""Runs another program with the emulation of the CUDA kernels on the CPU, instead of a GPU.

python -m benchmarks.emulated benchmarks.tiny_cuda --dry-run
"""

import runpy
import sys

from rnnfast import _C
from tests import native


def main() -> None:
    native.plug_in("cuda_emulation")
    _C.set_cpu_capability("cuda_emulation")
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
