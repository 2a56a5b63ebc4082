"""Which path runs a call, and why.

=========== ====================================================================
fused       this package's C++ and CUDA kernels (the extension ``rnnfast._C``)
aten        torch's own kernels, the ones torch.nn uses
reference   the formulas of `rnnfast.reference` in plain PyTorch
=========== ====================================================================

``auto``, the default, takes the first of them that can run. On CUDA, where the fused kernels have
not been measured yet, it takes ``aten`` for what torch's kernels can do.

The name that counts is the first of these that is given: the argument ``backend`` of the module or
function, `use_backend`, the environment variable ``RNNFAST_BACKEND``, ``auto``. The environment
variable counts for the whole process and is read when rnnfast is imported. `use_backend` counts for
one thread.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import isasyncgenfunction, isclass, iscoroutinefunction, isgeneratorfunction
from types import ModuleType, TracebackType
from typing import NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__
from .extension import NAME, TorchMismatchError, load
from .reference import CELLS

NAMES = ("auto", "fused", "aten", "reference")
_BACKEND, _CAPABILITY = "RNNFAST_BACKEND", "RNNFAST_CPU_CAPABILITY"
FUSED_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

EXTENSION: ModuleType | None
IMPORT_ERROR: ImportError | None
EXTENSION, IMPORT_ERROR = load()
"""The compiled extension, or None and the reason why it cannot be used."""


def check_name(name: str, origin: str) -> str:
    """Returns ``name``, given by ``origin``; ValueError if it names no backend."""
    if name not in NAMES:
        raise ValueError(f"{origin} should be one of {', '.join(NAMES)}, got: {name!r}")
    return name


def _fused_devices() -> frozenset[str]:
    if EXTENSION is None:
        return frozenset()
    return frozenset({"cpu", "cuda"} if EXTENSION.built_with()["cuda"] else {"cpu"})


_FUSED_DEVICES = _fused_devices()
_MEASURED_DEVICES = frozenset({"cpu"})
"""Where files in benchmarks/results show that the fused kernels are right, and faster than torch's.

Elsewhere ``auto`` takes them only for what torch's own kernels cannot do.
"""
CELL_KINDS: dict[str, int] = EXTENSION.cell_kinds() if EXTENSION is not None else {}
"""The number by which the extension knows a cell."""


def _check_environment() -> dict[str, str]:
    """What is wrong with the environment variables that cannot be followed, by their names.

    The import only warns of them. The first call that depends on one raises, `doctor` explains it.
    """
    errors = {}
    try:
        check_name(os.environ.get(_BACKEND) or "auto", _BACKEND)
    except ValueError as error:
        errors[_BACKEND] = str(error)
    try:
        if EXTENSION is not None:
            EXTENSION.get_cpu_capability()
    except ValueError as error:
        errors[_CAPABILITY] = f"{_CAPABILITY}: {error}"
    for words in errors.values():
        warnings.warn(f"{words}. Calls will raise; see rnnfast.doctor().", stacklevel=4)
    return errors


_ENVIRONMENT_ERRORS = _check_environment()
_ENVIRONMENT = "" if _BACKEND in _ENVIRONMENT_ERRORS else os.environ.get(_BACKEND) or "auto"
_warned: set[str] = set()
_Function = TypeVar("_Function", bound=Callable[..., object])


class _Forced(threading.local):
    """What `use_backend` has set, in each thread."""

    # an attribute of the class would have no guard in torch.compile
    def __init__(self) -> None:
        self.name: str | None = None


# no contextvars.ContextVar: torch.compile cannot trace its `get`
_forced = _Forced()


class use_backend:  # noqa: N801, as torch.set_grad_enabled
    """Forces a backend, for a ``with`` block, for a function, or from now on.

    It works as torch.set_grad_enabled does. As a context manager it counts until the end of the
    block. As a decorator it counts while the function runs. A plain call counts until the next one.

    It counts for the current thread alone. New threads start without it: on what
    ``RNNFAST_BACKEND`` says, or on "auto". So do the threads of torch.nn.DataParallel. The tasks of
    an asyncio loop share their thread, so do not await inside a block. An argument ``backend`` of a
    module or function takes precedence.

    torch.compile compiles a function again when it is called with another backend in force.

    Args:
        name: "fused", "aten", "reference" or "auto", which lifts what ``RNNFAST_BACKEND`` forces.
            None goes back to what ``RNNFAST_BACKEND`` says.

    Raises:
        ValueError: ``name`` is none of these.

    Example:
        >>> layer, x = rnnfast.LSTM(10, 20), torch.randn(5, 3, 10)
        >>> with rnnfast.use_backend("reference"):
        ...     expected, _ = layer(x)
        >>> torch.allclose(layer(x)[0], expected, atol=1e-5)
        True
        >>> _ = rnnfast.use_backend("aten")  # from now on, in this thread
        >>> _ = rnnfast.use_backend(None)  # as before
    """

    def __init__(self, name: str | None) -> None:
        self._name = None if name is None else check_name(name, "use_backend(name)")
        self._before = _forced.name
        _forced.name = self._name

    def __enter__(self) -> None:
        _forced.name = self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _forced.name = self._before

    def __call__(self, function: _Function) -> _Function:
        """Decorates a function: the backend counts while it runs.

        Raises:
            TypeError: It is a generator, a coroutine or a class, which do not run in one go.
        """
        _forced.name = self._before  # what the constructor has set
        kinds = (isclass, iscoroutinefunction, isgeneratorfunction, isasyncgenfunction)
        if any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                "use_backend decorates functions that run in one go, not classes, coroutines and "
                "generators: use `with rnnfast.use_backend(...)` inside them"
            )

        @wraps(function)
        def run(*args: object, **kwargs: object) -> object:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return cast(_Function, run)


def in_force(requested: str | None) -> str:
    """The backend asked for by the argument ``requested``, the context or the environment.

    Raises:
        ValueError: It is the environment's, and no backend.
    """
    return requested or _forced.name or _ENVIRONMENT or _refuse_environment()


def _refuse_environment() -> NoReturn:
    raise ValueError(_ENVIRONMENT_ERRORS[_BACKEND])


def transforms_active() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) or forward-mode AD is running.

    Both probes are private to torch, which offers no public ones; nothing else may use them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def choose(requested: str | None, tensor: Tensor, beyond_torch: bool = False) -> str:
    """Chooses the backend of a call whose tensors are like ``tensor``.

    The fused kernels know nothing of torch.func transforms and forward-mode AD: under those,
    ``fused`` and ``auto`` run the reference. In a graph of torch.compile or torch.export, torch's
    kernels would be one operation after the other for every step: there ``auto`` takes the fused
    kernels on every device that they are built for.

    Args:
        requested: The argument ``backend`` of the module or function, None if not given.
        tensor: The input of the call, for its device and dtype.
        beyond_torch: Whether torch's kernels lack what the call asks for.

    Returns:
        "fused", "aten" or "reference".

    Raises:
        ValueError: ``requested`` names no backend.
        RuntimeError: "fused" is forced and cannot run.
    """
    name = in_force(requested)
    if name == "aten" or name == "reference":
        return name
    device, dtype = tensor.device.type, tensor.dtype
    if device in _FUSED_DEVICES and dtype in FUSED_DTYPES and name in NAMES:
        if transforms_active():
            return "reference"
        preferred = device in _MEASURED_DEVICES or name == "fused" or beyond_torch
        return "fused" if preferred or torch.compiler.is_compiling() else "aten"
    if check_name(name, "backend") == "fused":
        refuse("fused", *_shortfall(device, dtype))
    if dtype in FUSED_DTYPES and (
        device in _MEASURED_DEVICES or (device == "cuda" and beyond_torch)
    ):
        _warn_once(*_shortfall(device, dtype))
    return "reference" if transforms_active() else "aten"


def short_path(requested: str | None) -> ModuleType | None:
    """The extension, if a call may first be offered to its ``run_layers`` or ``run_step``.

    They run plain calls on the CPU with little overhead and decline, with None, what is unusual.
    """
    if (
        (requested or _forced.name or _ENVIRONMENT) in ("auto", "fused")
        and not torch.compiler.is_compiling()
        and not transforms_active()
    ):
        return EXTENSION
    return None


def find_freed(tensors: Sequence[Tensor | None]) -> int | None:
    """The place of the first tensor whose storage was freed, or cut so that it lacks elements.

    ``untyped_storage().resize_(0)`` does so, and with it sharded training. Kernels, torch's own
    among them, would read beyond the end. Only plain tensors on the CPU are looked at.
    """
    if EXTENSION is None or torch.compiler.is_compiling():
        return None
    place = EXTENSION.find_freed(tensors)
    return None if place < 0 else place


def release_memory() -> int:
    """Returns memory that the kernels keep for later calls to the system.

    On the CPU the package keeps up to 256 MiB of large results and workspaces that are free, and
    reuses them, because mapping fresh pages costs as much as a small kernel. On CUDA torch's
    allocator keeps the memory; see torch.cuda.empty_cache.

    Returns:
        How many bytes were returned.

    Example:
        >>> rnnfast.release_memory() >= 0
        True
    """
    return 0 if EXTENSION is None else EXTENSION.release_memory()


def refuse(name: str, cause: str, remedy: str = "Use backend='aten' or leave it to 'auto'") -> None:
    """Raises the RuntimeError of a forced backend that cannot run."""
    raise RuntimeError(f"rnnfast: backend {name!r} cannot run: {cause}. {remedy}.")


def _shortfall(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Why the fused kernels cannot run on ``device`` and ``dtype``, and what would help."""
    if EXTENSION is None:
        if isinstance(IMPORT_ERROR, ModuleNotFoundError) and IMPORT_ERROR.name == NAME:
            cause = "no kernels were built when rnnfast was installed"
            remedy = "Install GCC, on Linux, then type `pip install --no-build-isolation .` again"
            return cause, remedy
        if isinstance(IMPORT_ERROR, TorchMismatchError):
            return str(IMPORT_ERROR), "Build it again with `pip install --no-build-isolation .`"
        cause = f"the compiled extension cannot be loaded ({IMPORT_ERROR})"
        return cause, "Build it again with `pip install --no-build-isolation .`"
    if device == "cuda" and dtype in FUSED_DTYPES:
        cause = "the extension was built without CUDA"
        return cause, "Rebuild it with FORCE_CUDA=1 where nvcc and a CUDA build of torch are"
    cause = f"there are no fused kernels for {dtype} on {device}"
    return cause, "Use backend='aten' or leave it to 'auto'"


def _warn_once(cause: str, remedy: str) -> None:
    if isinstance(IMPORT_ERROR, TorchMismatchError):
        return  # the import has warned
    # torch.compile cannot trace a warning.
    if cause not in _warned and not torch.compiler.is_compiling():
        _warned.add(cause)
        words = f"rnnfast: no fused kernels run, as {cause}. {remedy}; see rnnfast.doctor()."
        warnings.warn(words, stacklevel=2)


def _outcome(device: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """What `choose` would answer to a plain call now, and why not the fused path if not forced."""
    name = in_force(None)
    if name in ("aten", "reference"):
        return name, None
    if device in _FUSED_DEVICES and dtype in FUSED_DTYPES:
        if name == "fused" or device in _MEASURED_DEVICES:
            return "fused", None
        cause = "the fused kernels are built, but no measurement has shown yet that they are faster"
        return "aten", f"{cause}; backend='fused' runs them"
    return "error" if name == "fused" else "aten", _shortfall(device, dtype)[0]


def _extension_report() -> list[str]:
    if EXTENSION is None:
        cause, remedy = _shortfall("cpu", torch.float32)
        return [f"extension    {cause}", f"             {remedy}"]
    built = EXTENSION.built_with()
    chosen = "none" if _CAPABILITY in _ENVIRONMENT_ERRORS else EXTENSION.get_cpu_capability()
    return [
        f"extension    built with {built['compiler']} for torch {built['torch']}",
        f"cpu kernels  {chosen} (usable here: {', '.join(EXTENSION.cpu_capabilities())}; "
        f"{_setting(_CAPABILITY)})",
        f"cuda kernels {', '.join(built['cuda_arch']) if built['cuda'] else 'not built'}",
    ]


def _setting(variable: str) -> str:
    return f"{variable}={os.environ.get(variable, '')}"


def _report_on(device: str) -> tuple[str, str | None]:
    """What runs float32 on a device, "error" included, and why where that needs a reason."""
    try:
        name, cause = _outcome(device, torch.float32)
    except ValueError as error:
        return "error", f"{error}. Unset {_BACKEND}, or set it to one of these"
    if (device, name) == ("cpu", "fused") and _CAPABILITY in _ENVIRONMENT_ERRORS:
        return "error", f"{_ENVIRONMENT_ERRORS[_CAPABILITY]}. Unset it, or set it to one of these"
    return name, cause


def doctor() -> str:
    """Reports what was built, what this machine offers and which backend each cell would run on.

    It also explains environment variables with values that cannot be followed, and what to do.

    Returns:
        The report, of a few lines.

    Example:
        >>> print(rnnfast.doctor())  # doctest: +ELLIPSIS
        rnnfast ..., torch ..., Python ...
        extension    ...
        what runs    cpu       cuda
        elman_tanh   ...
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    outcomes = {device: _report_on(device) for device in ("cpu", "cuda")}
    chosen = _forced.name or _ENVIRONMENT or "none"
    lines = [
        f"rnnfast {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        *_extension_report(),
        f"torch        {torch.get_num_threads()} threads, CPU capability "
        f"{torch.backends.cpu.get_cpu_capability()}, {gpus} CUDA devices",
        f"backend      {chosen} ({_setting(_BACKEND)})",
        "",
        f"what runs    {'cpu':<10}cuda",
    ]
    for cell in CELLS:
        lines.append(f"{cell:<13}{outcomes['cpu'][0]:<10}{outcomes['cuda'][0]}")
    lines += [f"{device}: {cause}" for device, (_, cause) in outcomes.items() if cause]
    return "\n".join(lines)
