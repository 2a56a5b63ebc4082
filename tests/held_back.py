"""Runs the tests with fewer instruction sets: python -m tests.held_back [args].

It runs them once for each instruction set below this machine's best, to which the kernels of
rnnfast, torch, oneDNN and MKL are limited together. Arguments are passed to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys

from rnnfast import backend

# values of ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS
OTHERS = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx2_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}


def environment(name: str) -> dict[str, str]:
    """Returns the environment variables that limit all libraries to an instruction set."""
    aten, onednn, mkl = OTHERS[name]
    return {
        "RNNFAST_CPU_CAPABILITY": name,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


def main() -> int:
    assert backend.EXTENSION is not None, backend.IMPORT_ERROR
    failures = 0
    for name in backend.EXTENSION.cpu_capabilities()[:-1]:
        print(f"with instruction sets up to {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]
        failures += subprocess.run(command, env=os.environ | environment(name)).returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main())
