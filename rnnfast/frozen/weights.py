"""How frozen modules keep, save and load their weights.

Sizes: H hidden units, P the size of h (H unless projected), G gates, K the columns of a matrix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import backend, checks

TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
"""The types of frozen weights, by the names that `freeze` takes."""


class Weights(NamedTuple):
    """A matrix in the order of torch, with its bias."""

    weight: Tensor
    """(G*H, K), of one of the `TYPES`."""
    scale: Tensor | None
    """(G*H) for int8: a weight is its integer times the scale of its row; else None."""
    bias: Tensor | None
    """(G*H), or None."""

    def dense(self) -> Tensor:
        """The matrix in float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale.unsqueeze(1)

    def on_cpu(self) -> Weights:
        """The same on the CPU, detached, with scale and bias in float32."""
        scale, bias = (t if t is None else t.detach().float().cpu() for t in self[1:])
        return Weights(self.weight.detach().cpu(), scale, bias)

    def to(self, dtype: torch.dtype) -> Weights:
        """The matrix rounded to ``dtype``, one of the values of `TYPES`.

        int8 is symmetric, with one scale for each row: max |row| / 127. A row with a NaN or an
        infinity gets the scale NaN, so that all its products are NaN.
        """
        if self.weight.dtype is dtype:
            return self
        weight = self.dense()
        if dtype is not torch.int8:
            return Weights(weight.to(dtype), None, self.bias)
        if weight.numel() == 0:
            scale = weight.new_ones(weight.shape[0])
        else:
            largest = weight.abs().amax(1)
            scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
        # The quotients of a row of zeros, or of numbers too small for a scale, are not finite.
        integers = (weight / scale.unsqueeze(1)).nan_to_num(0, 0, 0).round().clamp(-127, 127)
        return Weights(integers.to(torch.int8), scale, self.bias)


def unpack(block: Tensor) -> Weights:
    """The weights in a block of bytes, in the order of torch."""
    weight, *others = torch.ops.rnnfast.unpack_weights(block)
    scale, bias = (part if part.numel() else None for part in others)
    return Weights(weight, scale, bias)


class Matrix(NamedTuple):
    """The names of a matrix, and its size."""

    block: str
    """The buffer that holds it in the frozen module."""
    weight: str
    """Its parameter in torch.nn's module, and its entry in a ``state_dict``."""
    bias: str | None
    shape: tuple[int, int]
    gates: int
    """G, or 1 for the projection of h."""
    is_table: bool = False
    """Whether the block has a row for each column: W_ih of a layer that reads one-hot tokens."""

    @property
    def scale(self) -> str:
        """The entry of its scales in a ``state_dict``."""
        return f"{self.weight}_scale"


class Frozen(nn.Module):
    """What frozen layers and frozen cells share: how weights are kept, saved and loaded.

    Each matrix is in a buffer of bytes, in the order in which the kernels read it. The
    ``state_dict`` has it under torch.nn's name in torch.nn's order, which is the same on every
    machine, and the scales of an int8 matrix under the same name with ``_scale`` behind it.
    ``load_state_dict`` takes that, or the ``state_dict`` of a module that is not frozen, and rounds
    the weights if they are not of the type ``weights``.
    """

    torch_class: type[nn.Module]
    """The class of torch.nn that does the same with its parameters."""
    weights: str
    """The type of the weights, one of the `TYPES`."""
    replaced: tuple[nn.Module, ...] = ()
    """The module that this one replaced in a model, if that is kept: see `rnnfast.accelerate`.

    It is in a tuple, since it would be a submodule otherwise, and its parameters the model's.
    """

    _times_packed = 0
    """How often a block was replaced by another one, which streams of this module do not read."""

    def __init__(
        self,
        source: nn.Module,
        matrices: Sequence[Matrix],
        weights: str,
        given: Mapping[str, Weights] | None = None,
    ) -> None:
        """Packs ``given`` by the names of ``source``'s parameters, or else these parameters."""
        super().__init__()
        if backend.EXTENSION is None:
            raise RuntimeError(
                f"frozen weights need rnnfast's compiled kernels: {backend.IMPORT_ERROR}"
            )
        self.weights = weights
        self._matrices = list(matrices)
        self._block_names = [matrix.block for matrix in self._matrices]
        for matrix in self._matrices:
            one = _parameters(source, matrix) if given is None else given[matrix.weight]
            if one.weight.is_meta:
                one = _unknown(one, TYPES[weights])
            self.register_buffer(matrix.block, self._pack(matrix, one), persistent=False)
        self.eval()

    def _pack(self, matrix: Matrix, given: Weights) -> Tensor:
        weights = given.to(TYPES[self.weights])
        return torch.ops.rnnfast.pack_weights(*weights, matrix.gates, matrix.is_table)

    def unpacked(self) -> dict[str, Weights]:
        """The weights in the order of torch.nn, by the names of their parameters there.

        Example:
            >>> frozen = rnnfast.freeze(torch.nn.GRU(10, 20), weights="int8")
            >>> weight, scale, bias = frozen.unpacked()["weight_ih_l0"]
            >>> weight.dtype, weight.shape, scale.shape, bias.shape
            (torch.int8, torch.Size([60, 10]), torch.Size([60]), torch.Size([60]))
        """
        return {each.weight: unpack(self.get_buffer(each.block)) for each in self._matrices}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that the C library runs (csrc/c/rnnfast.h), of one direction.

        The file is of the format safetensors: the tensors of ``state_dict()``, and in its metadata
        ``format`` ("rnnfast"), ``version`` ("1"), ``module`` ("layers" or "cell"), ``cell``,
        ``weights``, ``num_layers``, ``input_size``, ``hidden_size``, ``proj_size`` (0 without a
        projection) and ``bias`` ("0" or "1"). ``safetensors.torch.load_file`` reads the tensors,
        and ``load_state_dict`` takes them.

        Args:
            path: The file, which is overwritten.

        Raises:
            ImportError: The package safetensors is not installed.
            ValueError: The module is bidirectional, or reads tokens (``tokens=True``).
        """
        from safetensors.torch import save_file

        sizes = self._sizes()
        if getattr(self, "bidirectional", False):
            raise ValueError("the C library runs one direction, and the module is bidirectional")
        if any(matrix.is_table for matrix in self._matrices):
            raise ValueError("the C library reads vectors, and the module reads tokens")
        metadata = {"format": "rnnfast", "version": "1", "weights": self.weights, **sizes}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={key: str(value) for key, value in metadata.items()})

    def _sizes(self) -> dict[str, Any]:
        """What the metadata of `save` say about a module."""
        raise NotImplementedError

    def _blocks(self) -> list[Tensor]:
        buffers: dict[str, Any] = self._buffers
        return [buffers[name] for name in self._block_names]

    def _make_readable(self) -> None:
        """Packs the weights again if they are packed for another instruction set.

        That is so if the module came from another machine, or if the instruction set was changed.
        """
        device = self._blocks()[0].device
        if device.type != "cpu":
            raise RuntimeError(f"frozen layers run on the CPU, and this one was moved to {device}")
        readable = torch.ops.rnnfast.can_read_weights
        unknown = torch.compiler.is_compiling() or backend.is_tracing()
        if unknown or all(readable(block) for block in self._blocks()):
            return
        unpacked = self.unpacked()
        for matrix in self._matrices:
            self._buffers[matrix.block] = self._pack(matrix, unpacked[matrix.weight])
        self._times_packed += 1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        unpacked = self.unpacked()
        for matrix in self._matrices:
            weight, scale, bias = unpacked[matrix.weight]
            for name, value in (
                (matrix.weight, weight),
                (matrix.scale, scale),
                (matrix.bias, bias),
            ):
                if value is not None:
                    destination[f"{prefix}{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        known: set[str] = set()
        unpacked = self.unpacked()
        for matrix in self._matrices:
            names = [matrix.weight, matrix.scale, *([matrix.bias] if matrix.bias else [])]
            known.update(f"{prefix}{name}" for name in names)
            found = {name: state_dict.get(f"{prefix}{name}") for name in names}
            weight: Any
            weight, scale, bias = unpacked[matrix.weight]
            if found[matrix.weight] is not None:
                weight, scale = found[matrix.weight], found[matrix.scale]
            if matrix.bias and found[matrix.bias] is not None:
                bias = found[matrix.bias]
            if problem := _problem_of_saved(matrix, weight, scale, bias):
                error_msgs.append(f"{prefix}{problem}")
                continue
            if weight.dtype is not torch.int8:
                names.remove(matrix.scale)
                scale = None
            missing_keys.extend(f"{prefix}{name}" for name in names if found[name] is None)
            if weight.dtype is torch.int8 and scale is None:
                continue
            with torch.no_grad():
                block = self._pack(matrix, Weights(weight, scale, bias).on_cpu())
                current = self.get_buffer(matrix.block)
                # into the same memory, which other processes may share
                if current.shape == block.shape and current.device == block.device:
                    current.copy_(block)
                else:
                    self._buffers[matrix.block] = block
                    self._times_packed += 1
        if strict:
            own = (key for key in state_dict if key.startswith(prefix))
            unexpected_keys.extend(key for key in own if key not in known)

    def _refuse_gradients(self, input: Any, hx: Any) -> None:
        """RuntimeError if derivatives would have to pass through this module."""
        if backend.transforms_active():
            raise RuntimeError(
                "a frozen layer has no derivatives and runs under no transform of torch.func"
            )
        given = [getattr(input, "data", None) if isinstance(input, tuple) else input]
        given += hx if isinstance(hx, (tuple, list)) else [hx]
        if torch.is_grad_enabled() and any(
            isinstance(tensor, Tensor) and tensor.requires_grad for tensor in given
        ):
            raise RuntimeError(
                "a frozen layer has no gradients: call it under torch.no_grad(), or detach its "
                "input and states"
            )

    def _stand_ins(self) -> list[Tensor]:
        """Tensors of the sizes and type of the matrices, without memory, for checks."""
        zero = torch.zeros((), device="cpu")
        return [zero.expand(matrix.shape) for matrix in self._matrices]

    def _refuse(self, input: Any, hx: Any, problem: str) -> NoReturn:
        """Raises torch.nn's error for a malformed call, or ``problem`` if torch.nn raises none."""
        with checks.ChecksOnly(problem):
            self._twin().forward(input, hx)
        raise RuntimeError(problem)

    def _twin(self) -> nn.Module:
        """The module of torch.nn of the same sizes, without memory."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows: those of torch.nn's module, and the type."""
        return f"{self._twin().extra_repr()}, weights={self.weights!r}"


def _parameters(source: nn.Module, matrix: Matrix) -> Weights:
    """A matrix and its bias, which are parameters of a module."""
    # A plain attribute is what a wrapper sets before each call, as weight dropping does.
    for name in filter(None, (matrix.weight, matrix.bias)):
        if name not in source._parameters and not parametrize.is_parametrized(source, name):
            raise ValueError(
                f"{name} is no parameter of the module: something else computes it before each "
                "call, and a frozen module would not see that"
            )
    weight = getattr(source, matrix.weight).detach()
    bias = None if matrix.bias is None else getattr(source, matrix.bias).detach()
    if weight.dtype is not torch.float32 or weight.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"Expected float32 weights on the CPU, got {matrix.weight} with {weight.dtype} on "
            f"{weight.device}. Convert the module first: module.float().cpu()"
        )
    if weight.shape != matrix.shape:
        raise ValueError(f"Expected {matrix.weight} size {matrix.shape}, got {list(weight.shape)}")
    return Weights(weight, None, bias)


def _unknown(like: Weights, dtype: torch.dtype) -> Weights:
    """Weights for a module without memory, until others are loaded: with them all gates are NaN."""
    rows = like.weight.shape[:1]

    def nan(shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device="cpu")

    bias = None if like.bias is None else nan(rows)
    if dtype is torch.int8:
        zeros = torch.zeros_like(like.weight, dtype=dtype, device="cpu")
        return Weights(zeros, nan(rows), bias)
    return Weights(nan(like.weight.shape, dtype), None, bias)


def _problem_of_saved(matrix: Matrix, weight: Any, scale: Any, bias: Any) -> str | None:
    """What is wrong with a saved matrix; None if nothing is."""
    rows = matrix.shape[:1]
    for name, value, shape in (
        (matrix.weight, weight, matrix.shape),
        (matrix.scale, scale, rows),
        (matrix.bias, bias, rows),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            return f"{name}: expected a tensor with memory, got {type(value).__name__}"
        if not (value.is_floating_point() or (name == matrix.weight and value.dtype is torch.int8)):
            more = " or int8" if name == matrix.weight else ""
            return f"{name}: expected floating-point{more} numbers, got {value.dtype}"
        if value.shape != shape:
            return f"{name}: expected size {tuple(shape)}, got {list(value.shape)}"
    return None
