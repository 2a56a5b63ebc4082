"""Training: schedules, validation, early stopping, log, exact resumption, several processes."""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
import training_worker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rnnfast.cli import main
from rnnfast.models import CharLSTM, checkpoint, run_state, training
from rnnfast.models.atomic import write_atomically
from rnnfast.models.processes import Processes
from rnnfast.models.schedule import SCHEDULES, Schedule, constant, cosine, one_cycle, progress
from rnnfast.models.training import Record, Run, Trainer, TrainingOptions, evaluate, sample
from rnnfast.models.training_log import COLUMNS, TrainingLog, read_log
from rnnfast.text import CharVocabulary

TEXT = "the cat sat on the mat; " * 30
VOCABULARY = CharVocabulary(TEXT)
TOKENS = VOCABULARY.encode(TEXT)
LEARNT, HELD_OUT = TOKENS[:-100], TOKENS[-100:]
OPTIONS = TrainingOptions(
    **{"seq_length": 12, "batch_size": 5, "epochs": 3, "max_seconds": math.inf},
    **{"learning_rate": 0.02, "clip": 0.5, "eval_every": 4},
)
STEPS_PER_EPOCH = 11  # the last one is shorter


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models need only one, and a resumed run needs the same number as before."""
    torch.set_num_threads(1)


def small(seed=0, **options):
    torch.manual_seed(seed)
    options = {"num_layers": 2, "embedding_size": 6, "vocabulary": VOCABULARY, **options}
    return CharLSTM(len(VOCABULARY), 12, **options)


def new_run(options=OPTIONS, seed=0, **model_options):
    return Run(small(seed, **model_options), LEARNT, options, HELD_OUT)


def bits_of(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_run_is_the_training_loop_written_out():
    records = list(run := new_run(dtype=torch.float64))
    torch.manual_seed(0)
    model = small(dtype=torch.float64, lstm=nn.LSTM)
    adam = torch.optim.Adam(model.parameters())
    length = (len(LEARNT) - 1) // 5
    x = torch.stack([LEARNT[row * length :][:length] for row in range(5)])
    y = torch.stack([LEARNT[row * length + 1 :][:length] for row in range(5)])
    expected = []
    for step in range(3 * STEPS_PER_EPOCH):
        position = step % STEPS_PER_EPOCH * 12
        if position == 0:
            h = c = torch.zeros(2, 5, 12, dtype=torch.float64)
        adam.param_groups[0]["lr"] = 0.02 * one_cycle(step / (3 * STEPS_PER_EPOCH))
        embedded = model.embedding(x[:, position : position + 12])
        hidden, (h, c) = model.lstm(embedded, (h.detach(), c.detach()))
        log_p = model.head(hidden).log_softmax(-1)
        loss = -log_p.gather(-1, y[:, position : position + 12, None]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight.grad = gradient * min(1.0, 0.5 / (norm.item() + 1e-6))
        adam.step()
        expected.append((loss.item() / math.log(2), norm.item()))
    actual = [(record.bits_per_char, record.gradient_norm) for record in records]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    torch.testing.assert_close(bits_of(run), weights, rtol=1e-8, atol=1e-8)
    read = [min(12 * 5 * (step % 11), 620) for step in range(1, 11)]
    assert [record.characters for record in records[:10]] == read
    assert records[10].characters == length * 5
    assert records[-1].characters == run.characters == run.total_characters == length * 15
    assert [record.epoch for record in records] == [1] * 11 + [2] * 11 + [3] * 11


@pytest.mark.parametrize("options", [{}, {"eval_every": None}, {"max_seconds": 1e-9}])
def test_validations_come_when_they_should(options):
    records = list(run := new_run(replace(OPTIONS, **options)))
    looked = {record.step for record in records if record.validation_bits_per_char is not None}
    ends = {11, 22, 33}
    every = {4, 8, 12, 16, 20, 24, 28, 32}
    expected = {"max_seconds": {1}, "eval_every": ends}.get(next(iter(options), ""), ends | every)
    assert looked == expected
    assert records[-1].validation_bits_per_char == evaluate(run.model, HELD_OUT, 5, 12)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        (cosine, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
        (constant, [1] * 5),
        (one_cycle, [1 / 6, 0.8945703, 0.5412897, 0.1613592, 0]),
    ],
)
def test_shapes_of_the_learning_rate(shape, values):
    assert [shape(quarter / 4) for quarter in range(5)] == pytest.approx(values)


def test_the_learning_rate_rises_once_and_falls_to_zero():
    rates = [one_cycle(step / 100) for step in range(101)]
    assert rates.index(max(rates)) == 5
    assert rates[5] == 1
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)


def test_the_clock_counts_only_for_a_slow_training():
    assert progress(0.3, 0.6) == 0.3
    assert progress(0.3, 0.9) == pytest.approx(0.8)
    assert progress(0.3, 1.0) == 1.0
    assert progress(0.3, 5 / math.inf) == 0.3


@pytest.mark.parametrize("name", ["one-cycle", "cosine", "constant"])
def test_a_run_follows_its_schedule(name):
    shape = {"one-cycle": one_cycle, "cosine": cosine, "constant": constant}[name]
    rates = [record.learning_rate for record in new_run(replace(OPTIONS, schedule=name))]
    assert rates == pytest.approx([0.02 * shape(step / 33) for step in range(33)])


def test_a_plateau_halves_the_learning_rate():
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([weight], 0.8)
    schedule = Schedule("plateau", optimiser, lambda steps: steps / 9)
    rates = []
    for step, loss in enumerate((3.0, 2.0, 2.5, 1.9, 2.0, 2.0, 2.0, 2.0, 1.0)):
        schedule.before_step(step)
        schedule.after_validation(loss)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == [0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="one of one-cycle, cosine, constant, plateau; got 'up'"):
        new_run(replace(OPTIONS, schedule="up"))


def test_a_training_without_progress_runs_out_of_patience():
    options = replace(OPTIONS, learning_rate=1e-30, patience=3, eval_every=2)
    records = list(run := new_run(options))
    assert len(records) == 8  # validations after 2, 4, 6 and 8; the first is the best
    assert (run.best_step, run.out_of_patience, run.ended) == (2, True, True)
    assert run.best_bits == records[1].validation_bits_per_char
    assert len(list(new_run(replace(options, patience=None)))) == 33


def test_the_best_weights_are_kept():
    options = replace(OPTIONS, learning_rate=0.3, schedule="constant", clip=100.0, eval_every=1)
    records = list(run := new_run(options))
    looks = [record.validation_bits_per_char for record in records]
    assert run.best_bits == min(looks) < looks[-1]
    assert records[run.best_step - 1].validation_bits_per_char == run.best_bits
    run.restore_best()
    assert evaluate(run.model, HELD_OUT, 5, 12) == run.best_bits


@pytest.mark.filterwarnings("error")  # torch warns if schedulers are called out of order
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [0, 1, 11, 20])
def test_a_resumed_run_is_the_uninterrupted_one(schedule, steps, tmp_path):
    options = replace(OPTIONS, schedule=schedule, patience=20, learning_rate=0.1)
    whole = new_run(options, dropout=0.3)
    expected = list(whole)
    first = new_run(options, dropout=0.3)
    taken = list(itertools.islice(first, steps))
    run_state.save(first, {"--schedule": schedule}, tmp_path / "state")

    second = new_run(options, seed=1, dropout=0.3)
    settings, state = run_state.load(tmp_path / "state")
    assert settings == {"--schedule": schedule}
    run_state.restore(second, state)
    assert (second.steps, second.seconds) == (steps, first.seconds)
    assert taken + list(second) == expected
    assert_same(bits_of(second), bits_of(whole))
    assert second.seconds > first.seconds
    for run in (second, whole):
        run.restore_best()
    assert_same(bits_of(second), bits_of(whole))


def test_a_state_without_the_initial_learning_rate_goes_on(tmp_path):
    # Files from versions without LambdaLR do not have it.
    whole = new_run()
    expected = list(whole)
    first = new_run()
    taken = list(itertools.islice(first, 20))
    run_state.save(first, {}, tmp_path / "state")
    _, state = run_state.load(tmp_path / "state")
    for group in state["optimiser"]["param_groups"]:
        del group["initial_lr"]
    second = new_run(seed=1)
    run_state.restore(second, state)
    assert taken + list(second) == expected


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_more_epochs_continue_as_if_planned(schedule, tmp_path):
    whole = new_run(replace(OPTIONS, schedule=schedule, epochs=5), dropout=0.3)
    expected = list(whole)
    first = new_run(replace(OPTIONS, schedule=schedule, epochs=3), dropout=0.3)
    taken = list(first)
    run_state.save(first, {}, tmp_path / "state")
    longer = new_run(replace(OPTIONS, schedule=schedule, epochs=5), dropout=0.3)
    run_state.restore(longer, run_state.load(tmp_path / "state")[1])
    assert taken + list(longer) == expected
    assert_same(bits_of(longer), bits_of(whole))


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
@pytest.mark.parametrize("cut", ["epochs", "seconds"])
def test_a_longer_training_has_the_learning_rate_of_its_own_plan(name, cut, tmp_path):
    shape = {"one-cycle": one_cycle, "cosine": cosine}[name]
    options = replace(OPTIONS, schedule=name, epochs=5)
    short = replace(options, **({"epochs": 3} if cut == "epochs" else {"max_seconds": 1e-9}))
    first = new_run(short)
    taken = list(first)
    assert len(taken) == (33 if cut == "epochs" else 1)
    run_state.save(first, {}, tmp_path / "state")
    longer = new_run(options)
    run_state.restore(longer, run_state.load(tmp_path / "state")[1])
    rates = [record.learning_rate for record in longer]
    assert rates == pytest.approx([0.02 * shape(step / 55) for step in range(len(taken), 55)])
    assert longer.best_bits < first.best_bits


@pytest.mark.parametrize("step", [4, 11, 33])
@pytest.mark.parametrize("anew", [False, True])
def test_a_validation_that_was_ended_is_done_anew(step, anew, tmp_path):
    expected = list(new_run(dropout=0.3))
    run = new_run(dropout=0.3)

    def on_validation(part):
        parts.append(part)
        if run.steps == step:
            raise KeyboardInterrupt

    parts, taken = [], []
    run.on_validation = on_validation
    with pytest.raises(KeyboardInterrupt):
        taken.extend(run)  # the records before the exception
    assert (run.steps, run.recorded) == (step, step - 1)
    assert parts[0] == 12 / 19
    run.on_validation = None
    if anew:
        run_state.save(run, {}, tmp_path / "state")
        run = new_run(seed=1, dropout=0.3)
        run_state.restore(run, run_state.load(tmp_path / "state")[1])
        assert (run.steps, run.recorded) == (step, step - 1)
    assert taken + list(run) == expected


@pytest.mark.parametrize(
    ("limit", "rows", "columns"), [(None, 5, 19), (1, 5, 12), (70, 5, 14), (10**9, 5, 19)]
)
def test_a_validation_reads_the_beginnings_of_streams(limit, rows, columns):
    part = sample(HELD_OUT, 5, 12, limit)
    assert part.shape == (rows, columns + 1)
    for row in range(rows):
        assert torch.equal(part[row], HELD_OUT[19 * row : 19 * row + columns + 1])
    model = small(dtype=torch.float64)
    log_p = model(part[:, :-1])[0].log_softmax(-1)
    nats = -log_p.gather(-1, part[:, 1:, None]).mean().item()
    bits = evaluate(model, HELD_OUT, 5, 12, limit=limit)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-9)
    run = new_run(replace(OPTIONS, eval_characters=limit), dtype=torch.float64)
    assert run.evaluate() == pytest.approx(bits, rel=1e-12)


def test_time_is_kept_for_the_last_validation(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    run = new_run(replace(OPTIONS, eval_every=None, max_seconds=9.0))
    run.evaluate()  # one second passes between two calls of the clock
    assert len(list(run)) == 7  # an eighth step and a validation would not fit
    assert run.seconds == 10  # including the calls of the clock in the validation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--lr": 0.2}, "--lr was 0.1, is 0.2"),
        ({"--schedule": "plateau"}, "--schedule was cosine, is plateau"),
        ({"--lr": 0.2, "--epochs": 2, "--seed": 1}, "--lr was 0.1, is 0.2; --seed was 0, is 1"),
        ({"the text": "long"}, "the text was short, is long"),
    ],
)
def test_other_settings_are_refused_by_name(changes, words, tmp_path):
    saved = {"--schedule": "cosine", "--epochs": 3, "--lr": 0.1, "--seed": 0, "the text": "short"}
    assert run_state.merge(saved, {}, tmp_path) == saved
    assert run_state.merge(saved, saved, tmp_path) == saved
    words = rf"other settings: {words}\. Leave out what differs .* begin anew with --overwrite$"
    with pytest.raises(checkpoint.CheckpointError, match=words):
        run_state.merge(saved, changes, tmp_path)


@pytest.mark.parametrize("name", run_state.CHANGEABLE)
def test_settings_that_may_change_take_the_new_value(name, tmp_path):
    saved = {"--seed": 1, name: "old"}
    assert run_state.merge(saved, {name: "new"}, tmp_path) == {"--seed": 1, name: "new"}


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _zip(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter", content)
    return file.getvalue()


def _saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content, trap: b"", "not an intact training state"),
        (lambda content, trap: b"the cat sat on the mat", "not an intact training state"),
        (lambda content, trap: content[:-100], "not an intact training state"),
        (lambda content, trap: content[:100], "not an intact training state"),
        (lambda content, trap: _zip("dear cat"), "not an intact training state"),
        (lambda content, trap: pickle.dumps(Trap(trap)), "not an intact training state"),
        (lambda content, trap: _saved(Trap(trap)), "not an intact training state"),
        (lambda content, trap: _saved([1, 2]), "not a training state"),
        (lambda content, trap: _saved({"model": {}}), "not a training state"),
        (
            lambda content, trap: _saved(
                {"format": run_state._FORMAT, "settings": {}, "run": {"steps": "7"}}
            ),
            "does not hold a whole training",
        ),
        (
            lambda content, trap: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
            "damaged: the checksum of",
        ),
    ],
)
def test_damaged_and_foreign_states_are_refused(damage, words, tmp_path):
    path, trap = tmp_path / "state", tmp_path / "trap"
    run_state.save(new_run(), {}, path)
    path.write_bytes(damage(path.read_bytes(), str(trap)))
    with pytest.raises(checkpoint.CheckpointError, match=words) as refusal:
        run_state.load(path)
    assert "\n" not in str(refusal.value)
    assert not trap.exists()


def test_states_of_other_models_and_missing_states_are_refused(tmp_path):
    run_state.save(new_run(), {}, tmp_path / "state")
    _, state = run_state.load(tmp_path / "state")
    with pytest.raises(checkpoint.CheckpointError, match="does not hold a whole training"):
        run_state.restore(new_run(embedding_size=7), state)
    del state["optimiser"]
    with pytest.raises(checkpoint.CheckpointError, match="'optimiser'"):
        run_state.restore(new_run(), state)
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        run_state.load(tmp_path / "nothing")


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, b"new"),
        lambda path: checkpoint.save(small(), path),
        lambda path: run_state.save(new_run(), {}, path),
    ],
)
def test_a_failing_write_leaves_what_was_there(write, function, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_stay_tied_in_their_file(tied, tmp_path):
    model = small(embedding_size=12, tied_weights=tied)
    checkpoint.save(model, tmp_path / "model")
    copy = checkpoint.load(tmp_path / "model")
    assert_same(dict(copy.named_parameters()), dict(model.named_parameters()))
    assert (copy.head.weight is copy.embedding.weight) is tied
    assert copy.generate("the", 9, greedy=True) == model.generate("the", 9, greedy=True)
    before = evaluate(copy, HELD_OUT, 5, 12)
    list(Run(copy, LEARNT, OPTIONS))
    assert evaluate(copy, HELD_OUT, 5, 12) < before
    assert torch.equal(copy.head.weight, copy.embedding.weight) is tied


def test_a_log_has_a_row_for_every_step(tmp_path):
    run = new_run()
    with TrainingLog(tmp_path / "log.csv") as log:
        for record in run:
            log.write(record, run.seconds)
            rows = (tmp_path / "log.csv").read_text().splitlines()
            assert len(rows) == 1 + record.step
            assert rows[-1].split(",")[:-1] == ["" if v is None else repr(v) for v in record]
            assert float(rows[-1].split(",")[-1]) == pytest.approx(run.seconds, abs=6e-4)
    assert rows[0] == ",".join(COLUMNS)
    columns = read_log(tmp_path / "log.csv")
    assert list(columns) == list(COLUMNS)
    assert columns["step"].tolist() == list(range(1, 34))
    looked = columns["validation_bits_per_char"]
    assert looked[3] > looked[32]
    assert math.isnan(looked[2])


RECORDS = [Record(step, 1, 60 * step, 0.1, 2.5, 0.3, None) for step in range(1, 9)]


def write_log(path, records, **options):
    with TrainingLog(path, **options) as log:
        for record in records:
            log.write(record, 1.0)
        log.sync()


@pytest.mark.parametrize("rest", ["", "6,1,3", "6,1,360,0.1,2.5,0.3,,1.000\n7,", "junk\n\n"])
def test_a_resumed_log_loses_and_repeats_no_row(rest, tmp_path):
    write_log(tmp_path / "whole", RECORDS)
    write_log(tmp_path / "parts", RECORDS[:5])
    with (tmp_path / "parts").open("a") as file:
        file.write(rest)
    write_log(tmp_path / "parts", RECORDS[5:], steps=5)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    write_log(tmp_path / "parts", RECORDS[:2])
    assert len((tmp_path / "parts").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-1], "not all of the 8 steps"),
        (lambda text: text.replace("8,1", "9,1"), "not all of the 8 steps"),
        (lambda text: text.split("\n", 1)[1] + "8,1\n", "not the log of a training"),
        (lambda text: "", "not all of the 8 steps"),
    ],
)
def test_a_log_without_its_rows_is_refused(change, words, tmp_path):
    path = tmp_path / "log"
    write_log(path, RECORDS)
    path.write_text(change(path.read_text()))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        TrainingLog(path, 8)
    assert path.read_bytes() == content


def test_tensorboard_gets_the_same_numbers(tmp_path):
    records = [*RECORDS[:5], RECORDS[5]._replace(validation_bits_per_char=2.0)]
    write_log(tmp_path / "log", RECORDS, tensorboard=tmp_path / "board")
    write_log(tmp_path / "log", records[5:], steps=5, tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    names = {
        "bits per character/training": "bits_per_char",
        "bits per character/validation": "validation_bits_per_char",
        "learning rate": "learning_rate",
        "gradient norm": "gradient_norm",
    }
    assert set(events.Tags()["scalars"]) == set(names)
    for tag, name in names.items():
        expected = [(r.step, getattr(r, name)) for r in records if getattr(r, name) is not None]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(step, pytest.approx(value)) for step, value in expected], tag


def test_a_missing_tensorboard_is_named_and_the_old_log_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    write_log(tmp_path / "log", RECORDS)
    content = (tmp_path / "log").read_bytes()
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TrainingLog(tmp_path / "log", tensorboard=tmp_path)
    assert (tmp_path / "log").read_bytes() == content


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights(poison):
    run = new_run()
    with torch.no_grad():
        run.model.head.bias[0] = poison
    before = bits_of(run)
    with pytest.raises(ArithmeticError, match="the loss became nan; a lower learning rate"):
        next(iter(run))
    torch.testing.assert_close(bits_of(run), before, rtol=0, atol=0, equal_nan=True)


def test_a_validation_loss_that_is_not_finite_is_an_error():
    run = Run(small(), LEARNT, replace(OPTIONS, learning_rate=1e37, eval_every=1), HELD_OUT)
    with pytest.raises(ArithmeticError, match=r"validation loss became .*; a lower learning rate"):
        list(run)


def test_a_learning_rate_beyond_the_range_is_refused():
    with pytest.raises(OverflowError, match=r"overflow torch.float32 at a learning rate of 1e\+38"):
        Trainer(small(), 1e38, 1.0)
    Trainer(small(dtype=torch.float64), 1e38, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("epochs", -1), ("eval_every", 0), ("patience", 0), ("clip", math.nan)],
)
def test_useless_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be greater than zero, got {value}"):
        replace(OPTIONS, **{name: value})


def test_processes_need_equal_shares():
    with pytest.raises(ValueError, match="2 processes cannot share a batch size of 5 evenly"):
        Run(small(), LEARNT, OPTIONS, HELD_OUT, Processes(0, 2))


def torchrun(*command, processes=2):
    options = ["--standalone", "--nproc-per-node", processes]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, [*options, *command])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes trained, and the outcome in each of them."""
    return train_in(2, tmp_path_factory.mktemp("two"))


def train_in(processes, folder):
    (folder / "text").write_text(training_worker.TEXT)
    worker = training_worker.__file__
    done = torchrun(worker, folder / "text", folder, processes=processes)
    assert done.returncode == 0, done.stderr
    ranks = range(processes)
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in ranks], done


def test_two_processes_train_as_one(two):
    records, weights, wrappers = training_worker.train_in_float64(Processes())
    assert len(records) == 20
    assert wrappers == [0, 0]
    for outcome in two[1]:
        theirs, their_weights, wrappers = outcome["float64"]
        assert wrappers == [1, 0]
        assert outcome["wrappers after error"] == 0
        torch.testing.assert_close(
            [[float(value or 0) for value in record] for record in theirs],
            [[float(value or 0) for value in record] for record in records],
            rtol=0,
            atol=1e-11,
        )
        torch.testing.assert_close(their_weights, weights, rtol=0, atol=1e-11)


def test_two_processes_stop_together_and_resume_exactly(two):
    assert_stopped_and_resumed(*two)


@pytest.mark.full
def test_three_processes_stop_together_and_resume_exactly(tmp_path):
    # A sum of three numbers depends on their order, a sum of two does not.
    assert_stopped_and_resumed(*train_in(3, tmp_path))


def assert_stopped_and_resumed(folder, outcomes, done):
    for outcome in outcomes:
        assert (outcome["whole"], outcome["stopped"], outcome["resumed"]) == (0, 143, 0)
        assert outcome["steps"] == training_worker.INTERRUPTED_AT
    logs = [(folder / name / "log.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert len(logs[0]) > 12
    assert [line.rsplit(",", 1)[0] for line in logs[0]] == [
        line.rsplit(",", 1)[0] for line in logs[1]
    ]
    weights = [(folder / name / checkpoint.FILE_NAME).read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert done.stderr.count("stopped by SIGTERM after step 7 of") == 1
    assert "unused parameters" not in done.stderr


def test_the_first_of_two_processes_speaks_for_both(two):
    _, outcomes, done = two
    assert [outcome["uneven"] for outcome in outcomes] == [2, 2]
    assert [outcome["diverged"] for outcome in outcomes] == [2, 2]
    assert done.stderr.count("error: 2 processes cannot share a batch size of 3 evenly") == 1
    assert done.stderr.count("a lower learning rate may help") == 1
    assert done.stdout.count("bits per character of the held-out text") == 2
    assert done.stdout.count("resumed after step 7 of") == 1


@pytest.mark.full
def test_torchrun_of_the_command_is_one_process_up_to_rounding(tmp_path):
    (tmp_path / "text").write_text(training_worker.TEXT)
    arguments = ["train", "--text", tmp_path / "text", *training_worker.SMALL]
    arguments += ["--dropout", 0, "--epochs", 1, "--lr", 1e-3, "--out"]
    done = torchrun("-m", "rnnfast", *arguments, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out text") == 1
    assert main([str(argument) for argument in [*arguments, tmp_path / "one"]]) == 0
    one, two = (read_log(tmp_path / name / "log.csv") for name in ("one", "two"))
    for name in set(COLUMNS) - {"seconds"}:
        assert two[name] == pytest.approx(one[name], abs=1e-5, nan_ok=True), name
    one, two = (checkpoint.load(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
