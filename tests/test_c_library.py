"""The C library: results, what a call may not do, and files that it refuses."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import c_library
import pytest
import torch
from frozen_cases import every_type
from native import ROOT
from targets import VNNI
from torch import Tensor, nn

import rnnfast
from rnnfast import Stream, backend

CAPABILITIES = [] if backend.EXTENSION is None else backend.EXTENSION.cpu_capabilities()
MODELS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 5}),
    (nn.GRU, {"num_layers": 3, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTMCell, {}),
    (nn.RNNCell, {"bias": False}),
]


def run_program(path: Path, x: Tensor, **environment: str) -> Tensor:
    """The outputs of the program's steps and of its run: (2, T, B, P)."""
    done = subprocess.run(
        [c_library.program(), path, *map(str, x.shape[:2])],
        input=x.numpy().tobytes(),
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    y = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    return y.reshape(2, *x.shape[:2], -1)


@every_type
@pytest.mark.parametrize(("kind", "options"), MODELS, ids=str)
def test_the_bits_are_those_of_a_stream(
    kind: type[nn.Module], options: dict[str, Any], weights: str, tmp_path: Path
) -> None:
    frozen = rnnfast.freeze(kind(9, 20, **options), weights)
    frozen.save(tmp_path / "model")
    for T, B in ((1, 1), (150, 1), (70, 3)):
        x = torch.randn(T, B, 9)
        expected = Stream(frozen, B).run(x)
        assert expected.abs().max() > 1e-2
        for y in run_program(tmp_path / "model", x):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("capability", [name for name in CAPABILITIES if name not in VNNI])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    frozen, x = rnnfast.freeze(nn.LSTM(9, 40), "int8"), torch.randn(20, 2, 9)
    frozen.save(tmp_path / "model")
    steps, run = run_program(tmp_path / "model", x, RNNFAST_CPU_CAPABILITY=capability)
    assert torch.equal(steps, run)
    torch.testing.assert_close(run, frozen(x)[0], rtol=0, atol=0.03)


def test_saved_files_are_state_dicts(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    frozen = rnnfast.freeze(nn.GRU(3, 4, num_layers=2), "int8")
    frozen.save(tmp_path / "model")
    other = rnnfast.freeze(nn.GRU(3, 4, num_layers=2), "int8")
    other.load_state_dict(load_file(tmp_path / "model"))
    x = torch.randn(5, 2, 3)
    assert torch.equal(other(x)[0], frozen(x)[0])
    with safe_open(tmp_path / "model", "pt") as file:
        assert file.metadata() == {
            "format": "rnnfast",
            "version": "1",
            "module": "layers",
            "cell": "gru",
            "weights": "int8",
            "num_layers": "2",
            "input_size": "3",
            "hidden_size": "4",
            "proj_size": "0",
            "bias": "1",
        }
    both = rnnfast.freeze(nn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="one direction"):
        both.save(tmp_path / "other")


def parts_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def file_of(header: Any, data: bytes) -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(words)) + words + data


class Library:
    """The library, called through ctypes."""

    def __init__(self) -> None:
        self.calls = ctypes.CDLL(str(c_library.library()))
        self.calls.rnnfast_load_memory.restype = ctypes.c_void_p
        self.calls.rnnfast_load.restype = ctypes.c_void_p
        self.calls.rnnfast_stream_new.restype = ctypes.c_void_p

    def error_of(self, file: bytes) -> str:
        """Why a file is refused; empty if it is not."""
        error = ctypes.create_string_buffer(200)
        model = self.calls.rnnfast_load_memory(
            file, ctypes.c_size_t(len(file)), error, ctypes.c_size_t(len(error))
        )
        if not model:
            assert error.value
            return error.value.decode(errors="replace")
        self.calls.rnnfast_free(ctypes.c_void_p(model))
        return ""


def test_files_that_are_refused(tmp_path: Path) -> None:
    rnnfast.freeze(nn.LSTM(3, 4, num_layers=2), "int8").save(tmp_path / "model")
    file, library = (tmp_path / "model").read_bytes(), Library()
    header, data = parts_of(file)
    assert library.error_of(file) == ""
    assert library.error_of(file_of(header, data)) == ""

    def with_metadata(**changes: str) -> bytes:
        return file_of({**header, "__metadata__": {**header["__metadata__"], **changes}}, data)

    def with_tensor(**changes: Any) -> bytes:
        tensor = {**header["weight_hh_l1"], **changes}
        return file_of({**header, "weight_hh_l1": tensor}, data)

    without = {name.replace("l1_scale", "l1_other"): value for name, value in header.items()}
    plain = {name: value for name, value in header.items() if name != "__metadata__"}
    for bad, words in [
        (b"", "too short"),
        (b"\xff" * 8, "longer than the file"),
        (file_of(b"", data), "ends too early"),
        (file_of(b"[]", data), "expected '{'"),
        (file_of(b'{"a": 1}', data), "expected '{'"),
        (file_of(json.dumps(header).encode() + b"x", data), "goes on after its end"),
        (file_of(plain, data), "not a file of frozen layers: its metadata have no cell"),
        (file_of(without, data), "there is no weight_ih_l1_scale"),
        (with_metadata(format="other"), "the format is not rnnfast"),
        (with_metadata(version="2"), "version 2 of the format; this library reads 1"),
        (with_metadata(cell="elman"), "unknown cell elman"),
        (with_metadata(weights="int4"), "unknown type of weights int4"),
        (with_metadata(num_layers="0"), "num_layers is 0"),
        (with_metadata(num_layers="3"), "there is no weight_ih_l2"),
        (with_metadata(hidden_size="5"), "weight_ih_l0 has another shape than the metadata say"),
        (with_metadata(hidden_size="-4"), "hidden_size is -4"),
        (with_metadata(input_size="99999999999999999999"), "input_size is 9999"),
        (with_metadata(cell="gru"), "has another shape"),
        (with_metadata(cell="gru", proj_size="2"), "do not fit each other"),
        (with_metadata(bias="2"), "do not fit each other"),
        (with_metadata(bias="0"), "more tensors than the metadata say"),
        (with_metadata(module="cell"), "do not fit each other"),
        (with_metadata(module="model"), "module is model"),
        (with_metadata(num_layers="1"), "more tensors than the metadata say"),
        (with_metadata(weights="float32"), "weight_ih_l0 is I8, expected F32"),
        (with_tensor(data_offsets=[0, 10**9]), "not in the file"),
        (with_tensor(data_offsets=[64, 0]), "not in the file"),
        (with_tensor(data_offsets=[0, 63]), "another size than its shape"),
        (with_tensor(shape=[2**40, 2**40]), "too large"),
        (with_tensor(data_offsets=header["weight_hh_l0"]["data_offsets"]), "the same bytes"),
        (file + b"x", "bytes after the last tensor"),
        (with_tensor(shape=[-16, -4]), "expected a number"),
        (with_tensor(dtype="I4"), "unknown dtype I4"),
        (with_tensor(more=1), "unknown key more"),
        (file[:-1], "not in the file"),
    ]:
        assert words in library.error_of(bad)
    error = ctypes.create_string_buffer(12)
    assert not library.calls.rnnfast_load(b"/no/such/file", error, ctypes.c_size_t(12))
    assert error.value == b"cannot open"
    assert not library.calls.rnnfast_load(None, None, ctypes.c_size_t(0))


FUZZ = """
import random, sys
from pathlib import Path
from test_c_library import Library

library, file = Library(), Path(sys.argv[1]).read_bytes()
chance = random.Random(0)
refused = 0
for cut in range(len(file)):
    assert library.error_of(file[:cut])
for _ in range(3000):
    changed = bytearray(file)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(min(len(changed), 1500))
        changed[place] = chance.choice(b'09{}[]",:\\\\ \\0' + file)
    refused += bool(library.error_of(bytes(changed)))
assert refused > 1000, refused
"""


def test_damaged_files_do_not_crash(tmp_path: Path) -> None:
    rnnfast.freeze(nn.LSTM(2, 3, proj_size=2), "int8").save(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, tmp_path / "model"],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set(tmp_path: Path) -> None:
    rnnfast.freeze(nn.GRU(2, 3)).save(tmp_path / "model")
    done = subprocess.run(
        [c_library.program(), tmp_path / "model", "1", "1"],
        capture_output=True,
        text=True,
        env={"RNNFAST_CPU_CAPABILITY": "none"},
    )
    assert done.returncode == 1
    assert "capability 'none' is not available" in done.stderr
    assert "capability []" in done.stderr


def test_streams_that_are_refused(tmp_path: Path) -> None:
    rnnfast.freeze(nn.GRU(2, 3)).save(tmp_path / "model")
    calls = Library().calls
    model = ctypes.c_void_p(
        calls.rnnfast_load(str(tmp_path / "model").encode(), None, ctypes.c_size_t(0))
    )
    assert model.value
    error = ctypes.create_string_buffer(100)
    for batch in (0, 2**40):
        size = ctypes.c_size_t(len(error))
        assert not calls.rnnfast_stream_new(model, ctypes.c_size_t(batch), error, size)
        assert error.value == b"the batch is empty or too large"
    calls.rnnfast_free(model)
    calls.rnnfast_free(None)
    calls.rnnfast_stream_free(None)


@pytest.mark.full
def test_make_c_library_builds_the_examples(tmp_path: Path) -> None:
    """As a user builds it, with the same results."""
    subprocess.run(["make", "c-library"], cwd=ROOT, check=True, capture_output=True)
    frozen, x = rnnfast.freeze(nn.LSTM(3, 4)), torch.randn(5, 3)
    frozen.save(tmp_path / "model")
    done = subprocess.run(
        [ROOT / "build/c/step", tmp_path / "model"],
        input=" ".join(map(repr, x.flatten().tolist())),
        capture_output=True,
        text=True,
        check=True,
    )
    y = torch.tensor([[*map(float, line.split())] for line in done.stdout.splitlines()])
    assert torch.equal(y, Stream(frozen).run(x))
    rnnfast.freeze(nn.GRU(1, 1)).save(tmp_path / "effect")
    command = [ROOT / "build/c/audio", tmp_path / "effect", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "% of real time" in done.stdout
