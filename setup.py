"""Builds the one compiled module, rnnfast._C, from csrc/.

CUDA sources join where torch is a CUDA build and a matching nvcc is found; whether a GPU is visible
does not matter. Without a C++ compiler the package installs without the module and runs on torch's
own kernels. Environment: FORCE_CUDA=1 (an error unless CUDA can be built), RNNFAST_CUDA=0 (leave
CUDA out), RNNFAST_CPU_TARGETS=portable (leave out the kernels for AVX2 and AVX-512, most of a
build's time; the default is all), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import manifest_maker

TORCH_RANGE = "torch>=2.11,<2.15"
OLDEST_TORCH, BEYOND_NEWEST_TORCH = (2, 11), (2, 15)
COMMANDS = set(sys.argv[1:])
# sdist and egg_info compile nothing, so they need no torch.
WITHOUT_TORCH = bool(COMMANDS & {"sdist", "egg_info"}) and "bdist_wheel" not in COMMANDS

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"rnnfast: setuptools {setuptools.__version__} is installed, and 77 or newer is needed. "
        "Type: pip install 'setuptools>=77'"
    )
if not WITHOUT_TORCH:
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"rnnfast: torch cannot be imported ({error}). rnnfast must be built with the torch "
            "that it will run with.\n"
            "By default pip builds in a separate environment, which does not have your torch.\n"
            "Install torch, then type: pip install --no-build-isolation ."
        )
    TORCH_MINOR = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if not OLDEST_TORCH <= TORCH_MINOR < BEYOND_NEWEST_TORCH:
        sys.exit(
            f"rnnfast: torch {torch.__version__} is installed, and rnnfast needs {TORCH_RANGE}. "
            f"Type: pip install '{TORCH_RANGE}'"
        )

# Builds are parallel and incremental with ninja, which may be installed just beside this Python.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")

# -fopenmp only when compiling: the OpenMP runtime is the one that torch has loaded already.
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-Wall", "-Wextra"),
    "-DAT_PER_OPERATOR_HEADERS",  # torch's headers then declare only operators they need
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--compiler-options", "-fvisibility=hidden,-Wall,-Wextra"]
INCLUDE_DIR = str(Path(__file__).resolve().parent / "csrc")
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
CPU_SOURCES = [
    "csrc/torch/*.cpp",
    "csrc/cpu/kernels/*.cpp",
    "csrc/cpu/drivers/*.cpp",
    "csrc/cpu/*.cpp",
]
CUDA_SOURCES = ["csrc/cuda/*.cu", "csrc/torch/cuda/*.cpp"]
BEYOND_PORTABLE = "csrc/cpu/kernels/avx*.cpp"
CPU_TARGETS = os.environ.get("RNNFAST_CPU_TARGETS") or "all"
if CPU_TARGETS not in ("all", "portable"):
    sys.exit(f"rnnfast: RNNFAST_CPU_TARGETS should be all or portable, got: {CPU_TARGETS!r}")


def find_compiler() -> tuple[str | None, str]:
    """The command of the C++ compiler, or None and why none can build the kernels."""
    if sys.platform != "linux":
        return None, "the kernels are for Linux"
    command = os.environ.get("CXX", "").strip() or "c++"
    try:
        words = shlex.split(command)
    except ValueError as error:
        sys.exit(f"rnnfast: CXX={command}: {error}")
    if not shutil.which(words[0]):
        return None, "no C++ compiler (CXX, or c++ on PATH)"
    print_macros = [*words, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(print_macros, capture_output=True, text=True).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        return None, f"{command} is not GCC (CXX chooses the C++ compiler)"
    return command, ""


def find_cuda_home() -> Path | None:
    """The toolkit's folder; the nvcc on PATH may be a wrapper script that lies outside it."""
    nvcc = shutil.which("nvcc")
    on_path = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [os.environ.get("CUDA_HOME", ""), *on_path, "/usr/local/cuda"]:
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return Path(home)
    return None


def nvcc_major(cuda_home: Path) -> str:
    version = subprocess.check_output([cuda_home / "bin/nvcc", "--version"], text=True)
    return re.search(r"release (\d+)", version)[1]


def find_sources(patterns: list[str]) -> list[str]:
    left_out = glob(BEYOND_PORTABLE) if CPU_TARGETS == "portable" else []
    return sorted(path for pattern in patterns for path in glob(pattern) if path not in left_out)


def make_extension(cuda_home: Path | None) -> Extension:
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = str(cuda_home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    from torch.utils import cpp_extension as torch_build  # reads CUDA_HOME when imported

    # As system headers, torch's own give no warnings.
    torch_headers = [f"-isystem{path}" for path in torch_build.include_paths()]
    options = {
        "include_dirs": [INCLUDE_DIR],
        "define_macros": [("RNNFAST_PORTABLE_ONLY", None)] * (CPU_TARGETS == "portable"),
        "extra_compile_args": {"cxx": CXX_FLAGS + torch_headers, "nvcc": NVCC_FLAGS},
    }
    if cuda_home is None:
        return torch_build.CppExtension("rnnfast._C", find_sources(CPU_SOURCES), **options)

    extension = torch_build.CUDAExtension(
        "rnnfast._C", find_sources(CPU_SOURCES + CUDA_SOURCES), **options
    )
    archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
    extension.define_macros += [("RNNFAST_WITH_CUDA", None), ("RNNFAST_CUDA_ARCHS", f'"{archs}"')]
    # A toolkit of only the compiler lacks cuBLAS, which the packages that torch depends on have.
    packages = Path(torch.__file__).parents[1] / "nvidia"
    extension.include_dirs += map(str, packages.glob("*/include"))
    cublas = [*cuda_home.glob("lib64/libcublas.so"), *packages.glob("*/lib/libcublas.so.*")]
    extension.extra_link_args += map(str, cublas[:1])
    return extension


def choose_extensions() -> list[Extension]:
    """What to compile, after saying in one line what that is, what it is not, and why."""
    compiler, no_compiler = find_compiler()
    cuda_home, no_cuda = find_cuda_home(), None
    if compiler is None:
        no_cuda = no_compiler
    elif os.environ.get("RNNFAST_CUDA") == "0":
        no_cuda = "RNNFAST_CUDA=0"
    elif torch.version.cuda is None:
        no_cuda = f"torch {torch.__version__} is not a CUDA build"
    elif cuda_home is None:
        no_cuda = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
    elif nvcc_major(cuda_home) != torch.version.cuda.split(".")[0]:
        no_cuda = f"{cuda_home}/bin/nvcc is not of CUDA {torch.version.cuda}, as torch is"

    if no_cuda is not None and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"rnnfast: FORCE_CUDA=1, but CUDA cannot be compiled: {no_cuda}")
    if compiler is None:
        print(f"rnnfast: nothing compiled, torch's own kernels will run: {no_cuda}")
        return []
    extension = make_extension(cuda_home if no_cuda is None else None)
    if no_cuda is None:
        with_cuda = f"with CUDA {os.environ['TORCH_CUDA_ARCH_LIST']} ({cuda_home}/bin/nvcc)"
    else:
        with_cuda = f"without CUDA: {no_cuda}"
    cpu = f"the CPU ({compiler}{', portable only' if CPU_TARGETS == 'portable' else ''})"
    print(f"rnnfast: compiling for {cpu}, {with_cuda}")
    return [extension]


extensions = [] if WITHOUT_TORCH else choose_extensions()
requirement = TORCH_RANGE
command_classes = {}
if extensions:
    from torch.utils.cpp_extension import BuildExtension

    # torch's C++ interface changes with the minor version. An sdist keeps the whole range.
    requirement = "torch=={}.{}.*".format(*TORCH_MINOR)

    class BuildIncrementally(BuildExtension):
        """Keeps objects, in a folder for each Python, torch and choice of targets.

        Editable installs would not. The module itself is always linked anew: one that was built
        with another torch may lie where it belongs.
        """

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True
            python = sys.implementation.cache_tag
            self.build_temp = f"build/{python}-torch-{torch.__version__}"
            if CPU_TARGETS != "all":
                self.build_temp += f"-{CPU_TARGETS}"

        def run(self) -> None:
            super().run()
            # rnnfast/extension.py reads this before it loads the module.
            facts = Path(self.get_ext_fullpath("rnnfast._C")).with_suffix(".json")
            facts.write_text(json.dumps({"torch": torch.__version__}) + "\n", encoding="utf-8")

    command_classes["build_ext"] = BuildIncrementally

    class BuildWithHeaders(build_py):
        """Puts the headers of the kernels into the package: users' cells are compiled from them.

        An editable install uses those in csrc/.
        """

        def run(self) -> None:
            super().run()
            if self.editable_mode:
                return
            for path in glob("csrc/**/*.h", recursive=True):
                target = Path(self.build_lib, "rnnfast/headers", Path(path).relative_to("csrc"))
                self.mkpath(str(target.parent))
                self.copy_file(path, str(target))

    command_classes["build_py"] = BuildWithHeaders

manifest_maker.template = ".ci/MANIFEST.in"  # what an sdist has beside the package
setup(ext_modules=extensions, cmdclass=command_classes, install_requires=[requirement])
