"""benchmarks/streams.py: voice activity on single streams and on many, and what is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import streams, voice
from rnnfast import StreamBatch

QUICK = ["--processes", "1", "--streams", "9", "--batch", "1", "4", "9"]
QUICK += ["--frames", "30", "--rounds", "2", "--training", "1"]
BATCHED = ("StreamBatch", "StreamBatch, consecutive")


def test_features() -> None:
    x, speech = voice.synthetic(300, 50, seed=0)
    assert x.shape == (300, 50, voice.BANDS)
    assert 0.3 < speech.float().mean() < 0.7
    assert torch.equal(voice.synthetic(300, 50, seed=0)[0], x)
    assert not torch.equal(voice.synthetic(300, 50, seed=1)[0], x)
    assert x[speech].mean() > x[~speech].mean()


def test_the_detector_learns() -> None:
    found = voice.accuracies(voice.trained(40), 200, 16)
    assert set(found) == {"float32", "int8", "loudness"}
    assert min(found["float32"], found["int8"]) > found["loudness"] + 0.15


def test_everything_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    file, png = tmp_path / "streams.json", tmp_path / "latency.png"
    streams.main([*QUICK, "--json", str(file), "--png", str(png)])
    content = json.loads(file.read_text())
    assert content["command"].startswith("python -m benchmarks.streams --processes 1")
    single = [(row["name"], row["weights"]) for row in content["latency"]]
    both = [(name, weights) for weights in ("float32", "int8") for name in streams.ONE_CALL_EACH]
    assert single == [*both, ("torch.nn.LSTMCell", "float32"), ("ONNX Runtime", "float32")]
    for row in content["latency"]:
        assert row["steps"] == 60
        assert 0 < row["median"] <= row["99%"] <= row["99.9%"]
        assert row["tail"] == sorted(row["tail"])
    rows = content["throughput"]
    ways = [(name, batch) for batch in (1, 4, 9) for name in BATCHED]
    ways += [(name, 1) for name in streams.ONE_CALL_EACH]
    assert [(row["name"], row["batch"]) for row in rows] == 2 * ways
    for row in rows:
        assert 0 < row["min"] <= row["median"]
        assert ("call 99%" in row) == (row["name"] in BATCHED)
        if row["name"] in streams.ONE_CALL_EACH:
            assert row[f"over {row['name']}"] == 1
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert printed.count("Stream.step") == 4
    assert printed.count("consecutive") == 6


def test_wrong_outputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StreamBatch.step

    def swapped(batch: StreamBatch, slots: Any, input: Tensor) -> Tensor:
        return step(batch, slots, input.flip(0))

    with monkeypatch.context() as patch:
        patch.setattr(streams.rnnfast.StreamBatch, "step", swapped)
        with pytest.raises(AssertionError, match="StreamBatch, float32: not the bits of"):
            streams.main(QUICK)

    def wrong(lstm: nn.LSTM) -> streams.Single:
        return streams.module_of(nn.LSTM(lstm.input_size, lstm.hidden_size))

    monkeypatch.setattr(streams, "torch_cell_of", wrong)
    with pytest.raises(AssertionError, match=r"torch.nn.LSTMCell, float32: the outputs are off"):
        streams.main(QUICK)


def test_a_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(streams.sys.modules, "onnxruntime", None)
    streams.main(QUICK)
    assert "ONNX Runtime is left out" in capsys.readouterr().out


def test_medians_over_processes() -> None:
    runs = [{"a": [{"name": "x", "batch": 8, "min": value}]} for value in (3.0, 1.0, 2.0)]
    assert streams.merged(runs) == {"a": [{"name": "x", "batch": 8, "min": 2.0}]}


def test_sizes_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    for sizes in (["0"], ["4", "10"]):
        with pytest.raises(SystemExit):
            streams.main(["--streams", "9", "--batch", *sizes])
        assert "from 1 to the number of streams" in capsys.readouterr().err


def test_the_page_on_serving_has_what_its_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[1] / "rnnfast/docs/serving.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    text, names = page.read_text().replace(code, ""), dict[str, Any]()
    exec(compile(code, page, "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 11
    assert all(line in text for line in printed)
    assert names["cores"] == 103
    for batch, name in ((8, "8"), (64, "64"), (256, "256"), (1000, "1,000")):
        rates = " | ".join(f"{names['RATES'][weights][batch]:,.0f}" for weights in voice.WEIGHTS)
        assert f"| `StreamBatch.step`, {name} streams | {rates} |" in text
