"""The command line: what `rnnfast train` learns, prints and refuses."""

import re
import sys
import time

import pytest
from cli_cases import SMALL, TEXT, held_out_bits, log_of, refusal, train, written

from rnnfast.cli import main
from rnnfast.cli.progress import ProgressBar
from rnnfast.models import checkpoint
from rnnfast.text import CharVocabulary, default_text

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "cat.txt")


def test_train_then_generate(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path / "new" / "run", "--epochs", 25, "--prompt", "the cat ") == 0
    output = capsys.readouterr()
    bits = held_out_bits(output.out)
    assert bits["after training"] < 0.2 < bits["bigram model"] < bits["before training"]
    assert "the cat sat on the mat; “purr” ° the" in output.out
    assert "torch.nn.LSTM" in output.out
    assert "rnnfast.LSTM (" in output.out
    assert "char/s" in output.err
    assert "bits/char" in output.err
    assert (tmp_path / "new" / "run" / "loss.png").read_bytes().startswith(PNG)

    model = str(tmp_path / "new" / "run")
    arguments = ["generate", "--model", model, "--prompt", "on the", "--greedy"]
    assert main([*arguments, "--length", "33"]) == 0
    assert capsys.readouterr().out == "on the mat; “purr” ° the cat sat on the\n"


@pytest.mark.full
def test_train_is_repeatable(text_file, tmp_path, capsys):
    outputs = []
    for run in "ab":
        assert train(text_file, tmp_path / run, "--epochs", 1, "--seed", 3) == 0
        outputs.append(capsys.readouterr().out.split("\ntraining speed")[0])
    assert outputs[0] == outputs[1]
    assert "time limit" not in outputs[0]
    weights = [(tmp_path / run / checkpoint.FILE_NAME).read_bytes() for run in "ab"]
    assert weights[0] == weights[1]


def test_train_says_when_its_time_is_over(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path, "--epochs", 10**6, "--max-seconds", 0.3) == 0
    output = capsys.readouterr().out
    assert "the time limit of 0.3 s ended the training" in output
    assert "--resume with a larger --max-seconds goes on" in output


def test_train_ends_when_it_runs_out_of_patience(text_file, tmp_path, capsys):
    assert train(text_file, tmp_path, "--epochs", 99, "--lr", 1e-30, "--patience", 2) == 0
    output = capsys.readouterr().out
    assert "2 validations without a better loss ended the training after step 30 of" in output
    assert re.search(r"after training +\d\.\d+  after step 10, the best\n", output)


def test_train_with_tied_weights(text_file, tmp_path, capsys):
    options = [*("--hidden", 20, "--tied-weights", "--epochs", 2)]
    text = ["train", "--text", text_file, "--batch-size", 8, "--seq-length", 24, "--out"]
    assert main([str(argument) for argument in [*text, tmp_path, *options]]) == 0
    bits = held_out_bits(capsys.readouterr().out)
    assert bits["after training"] < bits["before training"]
    model = checkpoint.load(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.shape == (len(CharVocabulary(TEXT)), 20)
    assert train(text_file, tmp_path / "small", "--epochs", 1, "--greedy", "--embedding", 5) == 0
    assert "sample from 'the ' without chance" in capsys.readouterr().out
    arguments = [*text, tmp_path / "other", "--hidden", 20, "--tied-weights", "--embedding", 5]
    words = "--tied-weights needs --embedding to be --hidden, got 5 and 20; leave --embedding out"
    assert words in refusal(arguments, capsys)
    assert not (tmp_path / "other").exists()


def test_the_estimate_of_the_bar_knows_the_time_limit():
    bar = ProgressBar(10**9, seconds=70)
    bar.update(10)
    assert "<01:0" in str(bar) or "<01:10" in str(bar)
    bar.close()
    bar = ProgressBar(1000)
    assert "<?" in str(bar)
    bar.update(1000)
    assert "<00:00" in str(bar)
    bar.close()


def test_everything_is_over_in_time(tmp_path, capsys):
    """A long held-out text, sample and speed comparison must not exceed --max-seconds."""
    (tmp_path / "text").write_text(TEXT * 1000)
    start = time.monotonic()
    sizes = ["--hidden", 128, "--sample-length", 10**7, "--max-seconds", 2]
    assert train(tmp_path / "text", tmp_path, *sizes, "--eval-characters", 5000) == 0
    assert time.monotonic() - start < 10
    output = capsys.readouterr().out
    assert "of which 5,000 characters were read" in output
    assert "(no time is left)" in output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lr", 1e9, "--epochs", 1], 1, "worse than one that knows nothing .*: it diverged"),
        (["--epochs", 1, "--lr", 1e-4], 0, "a bigram model does better; a longer training"),
        (
            [
                "--epochs",
                4,
                "--lr",
                100,
                "--clip",
                1e9,
                "--eval-every",
                1,
                "--schedule",
                "constant",
            ],
            1,
            "",
        ),
    ],
)
def test_absurd_results_are_said(text_file, tmp_path, options, code, words, capsys):
    if code:
        with pytest.raises(SystemExit) as stop:
            train(text_file, tmp_path, *options)
        assert stop.value.code == code
    else:
        assert train(text_file, tmp_path, *options) == code
    output = capsys.readouterr()
    assert re.search(f"^rnnfast train: warning: .*{words}", output.err, re.M)
    assert "wrote model.safetensors" in output.out


def test_defaults_on_a_short_text_beat_the_bigram_model(tmp_path, capsys):
    (tmp_path / "text").write_text(default_text()[200_000:212_000])
    options = [
        "--hidden",
        "64",
        "--embedding",
        "32",
        "--max-seconds",
        "inf",
    ]  # a small model, for speed
    text = ["train", "--text", f"{tmp_path}/text", "--out", f"{tmp_path}/out"]
    assert main([*text, *options]) == 0
    output = capsys.readouterr()
    bits = held_out_bits(output.out)
    assert bits["after training"] < bits["bigram model"]
    assert "warning" not in output.err
    assert 400 <= len(log_of(tmp_path / "out")) - 1 < 420


def test_train_needs_tensorboard_only_if_asked(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    arguments = ["train", "--text", text_file, "--out", tmp_path, *SMALL, "--tensorboard"]
    assert "pip install tensorboard" in refusal(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--text {}: No such file"),
        (b"", "--text: {} is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"abc", "too short: of its 3 characters --validation"),
        (
            b"abcd" * 50,
            "--validation 0.1 leaves 180 to learn from, and --batch-size 8 with --seq-length 24 "
            "needs 193. Give a longer --text, or a smaller --batch-size or --seq-length",
        ),
    ],
)
def test_train_refuses_useless_texts(tmp_path, content, words, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    arguments = ["train", "--text", path, "--out", tmp_path / "out", *SMALL]
    assert words.format(path) in refusal(arguments, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--prompt", "THE", "--prompt: unknown characters: the vocabulary of 17 lacks 'E', 'H'"),
        ("--prompt", "", "at least one character"),
        ("--text", "", "--text: expected the name of a file or folder, got an empty one"),
        ("--text", "/", "--text /: Is a directory"),
        ("--out", "", "--out: expected the name of a file or folder, got an empty one"),
        ("--eval-characters", "0", "1 or more"),
        ("--temperature", "-1", "expected a number above zero, got '-1'"),
        ("--temperature", "nan", "above zero"),
        ("--hidden", "0", "1 or more"),
        ("--layers", "1.5", "without fraction"),
        ("--lr", "fast", "above zero, got 'fast'"),
        ("--dropout", "1", "below 1"),
        ("--validation", "1", "between 0 and 1"),
        ("--validation", "1e-9", "--validation 1e-09 holds out 0, and 2 are needed"),
        ("--device", "abacus", "device 'abacus' cannot be used"),
        ("--backend", "warp", "invalid choice"),
        ("--out", __file__, f"--out {__file__}: File exists"),
        ("--out", __file__ + "/model", f"--out {__file__}/model: Not a directory"),
        ("--out", "/proc", "--out /proc"),
        ("--schedule", "up", "invalid choice: 'up'"),
        ("--patience", "0", "1 or more"),
        ("--max-seconds", "0", "above zero, or inf"),
        ("--embedding", "0", "1 or more"),
        ("--checkpoint-every", "0", "1 or more"),
        ("--nonsense", "1", "unrecognized arguments"),
    ],
)
def test_train_refuses_useless_options(text_file, tmp_path, option, value, words, capsys):
    arguments = ["train", "--text", text_file, "--out", tmp_path, *SMALL, option, value]
    assert words in refusal(arguments, capsys)


@pytest.mark.parametrize("rate", ["1e37", "1e38", "1e300"])
def test_train_says_when_it_diverges(text_file, tmp_path, rate, capsys):
    with pytest.raises(SystemExit) as stop:
        train(text_file, tmp_path, "--epochs", 1, "--lr", rate)
    assert stop.value.code == 2
    assert "a lower learning rate may help" in capsys.readouterr().err.splitlines()[-1]
