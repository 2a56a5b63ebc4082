"""Dates and their spellings, translators and their files, and `rnnfast translate`."""

import io
import itertools
import json
import os
import re
import signal
import sys
import time
from datetime import date, datetime, timedelta

import pytest
import torch
from safetensors.torch import load_file, save_file

from rnnfast.cli import main
from rnnfast.models import CharLSTM, Seq2SeqLSTM, checkpoint
from rnnfast.models.checkpoint import CheckpointError
from rnnfast.models.translation import (
    TrainingOptions,
    Translator,
    exact_match,
    load_pairs,
    split_pairs,
    train,
)
from rnnfast.text import TextError
from rnnfast.text.dates import FORMATS, YEARS, date_pairs, is_held_out, spellings

PAIRS = [("one", "1"), ("two", "2"), ("eleven", "11"), ("twelve", "12")]
KEY = "rnnfast.Seq2SeqLSTM"
LEARNT = 0.98


def days(first, last):
    return [first + timedelta(n) for n in range((last - first).days + 1)]


def read_date(spelling):
    """Parse a spelling by the documented rules, and check its weekday."""
    words = re.findall(r"[a-z]+|\d+", spelling.lower())
    words = [word for word in words if word not in ("the", "of", "st", "nd", "rd", "th")]
    numbers = [word for word in words if word.isdigit()]
    names = [word for word in words if not word.isdigit()]
    year = numbers.pop(0 if len(numbers[0]) == 4 else -1)
    year_first = len(year) == 4 and spelling.startswith(year)
    full = int(year) if len(year) == 4 else int(year) + (1900 if int(year) >= 50 else 2000)
    if len(numbers) == 2:
        month, day = (int(number) for number in (numbers if year_first else reversed(numbers)))
    else:
        name = names.pop(0 if len(names) == 1 or names[1].endswith("day") else -1)
        month = datetime.strptime(name, "%b" if len(name) == 3 else "%B").month
        day = int(numbers[0])
    found = date(full, month, day)
    for weekday in names:
        assert weekday in (found.strftime("%a").lower(), found.strftime("%A").lower())
    return found


@pytest.mark.parametrize(
    ("day", "some"),
    [
        (
            date(1997, 3, 4),
            [
                *("Tuesday, 4 March 1997", "Tue, 04 Mar 1997", "1997, March the 4th", "4/3/97"),
                *("Tuesday the 4th of March, 1997", "March 4, 1997", "04/03/1997", "4.3.1997"),
                *("1997/03/04", "1997-3-4", "4-Mar-97", "04.03.97", "the 4th of March 1997"),
            ],
        ),
        (date(2001, 11, 22), ["Thursday, 22 November 2001", "22/11/01", "Nov 22nd, 2001"]),
        (date(1950, 1, 1), ["1st January 1950", "Sun, 1 Jan '50"]),
        (date(2049, 12, 31), ["31st December 2049", "31.12.49"]),
    ],
)
def test_spellings_of_some_dates(day, some):
    assert set(some) <= set(spellings(day))
    assert len(spellings(day)) == len(FORMATS) >= 12


@pytest.mark.parametrize("day", [date(1949, 12, 31), date(2050, 1, 1), date(1900, 3, 4)])
def test_years_that_two_digits_do_not_tell_are_written_in_full(day):
    written = spellings(day)
    assert 12 <= len(written) < len(FORMATS)
    assert all(str(day.year) in spelling for spelling in written)


def test_every_spelling_stands_for_its_date():
    for day in [
        *days(date(1949, 7, 1), date(1950, 7, 1)),
        *days(date(2049, 7, 1), date(2050, 7, 1)),
    ]:
        assert {read_date(spelling) for spelling in spellings(day)} == {day}


@pytest.mark.parametrize(
    ("number", "suffix"),
    [
        *((1, "st"), (2, "nd"), (3, "rd"), (4, "th"), (11, "th"), (12, "th"), (13, "th")),
        *((20, "th"), (21, "st"), (22, "nd"), (23, "rd"), (24, "th"), (30, "th"), (31, "st")),
    ],
)
def test_ordinals(number, suffix):
    assert f"{number}{suffix} May 1999" in spellings(date(1999, 5, number))


def test_pairs_are_spellings_in_any_case_and_their_iso_form():
    pairs = date_pairs(4000, 3)
    assert len(pairs) == 4000
    for spelling, iso in pairs:
        day = date.fromisoformat(iso)
        assert read_date(spelling) == day
        assert day.year in YEARS
        usual = spellings(day)
        assert spelling in [case(each) for each in usual for case in (str, str.lower, str.upper)]
    assert {iso[:3] for _, iso in pairs} == {str(year)[:3] for year in YEARS}
    letters = [spelling for spelling, _ in pairs if any(map(str.isalpha, spelling))]
    for case in (str.islower, str.isupper):
        assert 0.15 < sum(map(case, letters)) / len(letters) < 0.4


def test_pairs_follow_their_seed():
    assert date_pairs(50, 1) == date_pairs(50, 1)[:50] != date_pairs(50, 2)


def test_dates_are_held_out_by_date():
    every = days(date(1900, 1, 1), date(2099, 12, 31))
    share = sum(map(is_held_out, every)) / len(every)
    assert share == pytest.approx(0.1, abs=0.005)
    for month in range(1, 13):
        assert any(is_held_out(day) for day in every if day.month == month and day.year == 2000)
    learnt, held_out = ({iso for _, iso in date_pairs(5000, 0, held_out=h)} for h in (False, True))
    assert not learnt & held_out
    assert all(is_held_out(date.fromisoformat(iso)) for iso in held_out)
    assert len(held_out) > 2000


def test_years_can_be_chosen():
    pairs = date_pairs(300, 0, years=range(1600, 1700, 50))
    assert {iso[:4] for _, iso in pairs} == {"1600", "1650"}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda: spellings(date(999, 1, 1)), "year of four digits, got 999"),
        (lambda: date_pairs(1, 0, years=range(900, 1100)), "years of four digits, got 900"),
        (lambda: date_pairs(1, 0, years=range(9000, 10001)), "years of four digits, got 10000"),
        (lambda: date_pairs(1, 0, years=range(0)), "no such dates"),
    ],
)
def test_impossible_dates_are_refused(request_, words):
    with pytest.raises(ValueError, match=words):
        request_()


def small(**options):
    torch.manual_seed(0)
    return Translator.for_pairs(PAIRS, 16, **options)


QUICK = TrainingOptions(batch_size=4, epochs=150, max_seconds=60, learning_rate=2e-2, clip=1.0)


@pytest.fixture(scope="module")
def trained():
    """A translator that has memorised PAIRS, and the losses of its training."""
    translator = small()
    losses = [step.bits_per_char for step in train(translator, PAIRS, QUICK)]
    return translator, losses


def test_training_learns(trained):
    translator, losses = trained
    assert losses[0] > 2
    assert losses[-1] < 0.05
    assert len(losses) == 150
    for beam_size in (1, 2, 300):
        translations = translator.translate([source for source, _ in PAIRS], beam_size)
        assert translations == [target for _, target in PAIRS]
        assert exact_match(translator, PAIRS, beam_size) == 1
    wrong = [("one", "2"), ("two", "2"), ("eleven", "1"), ("twelve", "")]
    assert exact_match(translator, wrong) == 0.25


def test_many_texts_are_translated_in_their_order(trained):
    translator, _ = trained
    pairs = PAIRS * 200
    for beam_size in (1, 3):
        translations = translator.translate([source for source, _ in pairs], beam_size)
        assert translations == [target for _, target in pairs]
    assert translator.translate([]) == []


def test_translations_have_their_greatest_length():
    translator = small()
    with torch.no_grad():
        translator.model.head.bias[translator.target.token("1")] = 100.0
    assert translator.max_length == 2
    assert translator.translate(["one"]) == ["11"]


def test_training_uses_the_options(trained):
    _, losses = trained
    repeated = [step.bits_per_char for step in train(small(), PAIRS, QUICK)]
    assert repeated == losses
    free = TrainingOptions(4, 150, 60, 2e-2, 1.0, teacher_forcing=0.0)
    others = [step.bits_per_char for step in train(small(), PAIRS, free)]
    assert others != losses
    assert others[-1] < 0.1
    by_ones = list(train(small(), PAIRS, TrainingOptions(3, 2, 60, 1e-2, 1.0)))
    assert len(by_ones) == 4
    assert sum(step.characters for step in by_ones) == 2 * (6 + 4)


def test_a_step_clips_the_gradient():
    translator = small()
    next(train(translator, PAIRS, TrainingOptions(4, 1, 60, 1e-3, clip=0.01)))
    norm = torch.stack([weight.grad.norm() for weight in translator.model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_training_ends_when_its_time_is_over():
    options = TrainingOptions(4, 10**6, max_seconds=0.3, learning_rate=1e-2, clip=1.0)
    next(
        train(small(), PAIRS, options)
    )  # the first step of a process triggers lazy imports of torch
    assert len(list(train(small(), PAIRS, options))) > 1


def test_training_stops_at_a_loss_that_is_not_finite():
    translator = small()
    with torch.no_grad():
        translator.model.head.bias[0] = torch.nan
    with pytest.raises(ArithmeticError, match="lower learning rate"):
        next(train(translator, PAIRS, QUICK))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda: Translator.for_pairs([], 4), "at least one pair"),
        (lambda: small().translate(["one", ""]), "got an empty one"),
        (lambda: small().translate(["one", "TWO"]), "'TWO' cannot be read: .* lacks 'O', 'T', 'W'"),
        (lambda: small().translate(["one"], 0), "beam_size must be 1 or more, got 0"),
        (lambda: exact_match(small(), []), "at least one pair"),
        (lambda: next(train(small(), [("one", "9")], QUICK)), "lacks '9'"),
        (lambda: next(train(small(), [("", "1")], QUICK)), "got an empty one"),
        (lambda: next(train(small(), [], QUICK)), "at least one sequence"),
        (lambda: Translator(small().model, small().source, small().target, 0), "got 0"),
        (lambda: Translator(small().model, small().target, small().target, 2), "do not fit"),
        (lambda: Translator(small().model, small().source, small().source, 2), "lacks '<s>'"),
    ],
)
def test_impossible_requests_are_refused(request_, words):
    with pytest.raises(ValueError, match=words):
        request_()


def test_a_translator_survives_its_file(tmp_path, trained):
    translator, _ = trained
    translator.save(tmp_path / checkpoint.FILE_NAME)
    for path in (tmp_path, tmp_path / checkpoint.FILE_NAME):
        copy = Translator.load(path, backend="reference")
        assert copy.model.config == translator.model.config
        assert (copy.source, copy.target) == (translator.source, translator.target)
        assert copy.max_length == translator.max_length
        for name, value in translator.model.state_dict().items():
            assert torch.equal(copy.model.state_dict()[name], value)
        assert copy.model.encoder.backend == copy.model.decoder.backend == "reference"
        assert exact_match(copy, PAIRS) == 1
    next(train(copy, PAIRS, QUICK))
    assert not torch.equal(copy.model.head.bias, translator.model.head.bias)


def described(change):
    """The content of a file with a changed description."""

    def write(path):
        small().save(path)
        description = {
            "config": small().model.config._asdict(),
            "source": small().source.state(),
            "target": small().target.state(),
            "max_length": 2,
        }
        change(description)
        save_file(load_file(path), path, {KEY: json.dumps(description)})

    return write


def cut(path):
    small().save(path)
    path.write_bytes(path.read_bytes()[:-100])


def without_a_weight(path):
    small().save(path)
    tensors = load_file(path)
    tensors.pop("head.bias")
    description = {
        "config": small().model.config._asdict(),
        "source": small().source.state(),
        "target": small().target.state(),
        "max_length": 2,
    }
    save_file(tensors, path, {KEY: json.dumps(description)})


DAMAGED = [
    (lambda path: path.write_bytes(b""), "not an intact safetensors file"),
    (lambda path: path.write_bytes(b"no safetensors" * 9), "not an intact safetensors file"),
    (cut, "not an intact safetensors file"),
    (lambda path: checkpoint.save(CharLSTM(4, 4), path), f"it does not name {KEY}"),
    (lambda path: save_file({"head.bias": torch.zeros(2)}, path), f"it does not name {KEY}"),
    (lambda path: save_file({}, path, {KEY: "{"}), "not hold a whole translator: Expecting"),
    (lambda path: save_file({}, path, {KEY: "[]"}), "not hold a whole translator"),
    (without_a_weight, "head.bias"),
    (described(lambda d: d.pop("source")), "source"),
    (described(lambda d: d.pop("max_length")), "max_length"),
    (described(lambda d: d.update(max_length=0)), "integer of 1 or more, got 0"),
    (described(lambda d: d.update(max_length="many")), "integer of 1 or more, got 'many'"),
    (described(lambda d: d.update(max_length=1e999)), "integer of 1 or more, got inf"),
    (described(lambda d: d.update(target=d["source"])), "lacks '<s>'"),
    (described(lambda d: d["source"]["items"].pop()), "do not fit"),
    (described(lambda d: d["target"].update(special=["</s>", "<s>"])), "do not fit"),
    (described(lambda d: d["config"].update(hidden_size=8)), "size mismatch"),
    (described(lambda d: d["config"].update(hidden_size="wide")), "not hold a whole translator"),
    (described(lambda d: d["config"].update(depth=8)), "depth"),
    (described(lambda d: d.update(config=[])), "expected a config of names and values"),
    (described(lambda d: d.update(config=None)), "expected a config of names and values"),
    (described(lambda d: d["config"].update(dropout=int("9" * 400))), "dropout to be float"),
    (described(lambda d: d["config"].update(padding_token=0.0)), "padding_token to be int"),
]


@pytest.mark.parametrize(("write", "words"), DAMAGED)
def test_damaged_and_foreign_files_are_refused(tmp_path, write, words):
    path = tmp_path / "file"
    write(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Translator.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unchanged_description_is_accepted(tmp_path):
    described(lambda d: None)(tmp_path / "file")
    assert Translator.load(tmp_path / "file").model.config == small().model.config


def test_missing_files_and_folders_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="of rnnfast translate, or the folder"):
        Translator.load(tmp_path)
    with pytest.raises(OSError, match="missing"):
        small().save(tmp_path / "missing" / "file")


def test_pairs_are_read_from_lines(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeffone\t1\r\n größer \t> \n", encoding="utf-8")
    assert load_pairs(path) == [("one", "1"), (" größer ", "> ")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\t1\n\ntwo\t2\n", "line 2: expected source, tab, target, got ''"),
        (b"one 1\n", "line 1: .* got 'one 1'"),
        (b"one\t\n", "line 1"),
        (b"\t1\n", "line 1"),
        (b"one\t1\t2\n", "line 1"),
        (b"", "is empty"),
        (b"\xff\t1\n", "not UTF-8"),
    ],
)
def test_lines_that_are_no_pairs_are_refused(tmp_path, content, words):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(TextError, match=words):
        load_pairs(path)


def translate(*arguments):
    return main(["translate", *map(str, arguments)])


def refusal(arguments, capsys):
    """The error message for invalid arguments."""
    with pytest.raises(SystemExit) as stop:
        translate(*arguments)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("rnnfast")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trained):
    """A folder with the translator of PAIRS."""
    path = tmp_path_factory.mktemp("translator")
    trained[0].save(path / checkpoint.FILE_NAME)
    return path


SMALL = ["--hidden", 8, "--embedding", 4, "--examples", 200, "--epochs", 1]


def test_dates_are_read_from_standard_input(tmp_path, capsys, monkeypatch):
    """The training of `test_dates_are_learnt`, but too short to learn much."""
    assert translate("--out", tmp_path / "new" / "run", *SMALL) == 0
    output = capsys.readouterr()
    assert len(re.findall(r"exact matches on 2,000 held-out texts: [\d.]+ %", output.out)) == 1
    assert "char/s" in output.err
    assert "bits/char" in output.err
    held_out = date_pairs(5, 9, held_out=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f" {text}\n" for text, _ in held_out)))
    assert translate("--model", tmp_path / "new" / "run", "--beam", 3) == 0
    translator = Translator.load(tmp_path / "new" / "run")
    expected = translator.translate([text for text, _ in held_out], 3)
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.full
def test_dates_are_learnt(tmp_path, capsys, monkeypatch):
    """The default training, shortened by half."""
    out = tmp_path / "new" / "run"
    assert translate("--out", out, "--examples", 20000, "--epochs", 3) == 0
    output = capsys.readouterr()
    (accuracy,) = re.findall(r"exact matches on 2,000 held-out texts: ([\d.]+) %", output.out)
    assert float(accuracy) >= 100 * LEARNT
    shown = re.findall(r"^  (\S.*\S) +(\d{4}-\d\d-\d\d)", output.out, re.MULTILINE)
    assert len(shown) == 8
    assert sum(read_date(spelling).isoformat() == iso for spelling, iso in shown) >= 6
    assert all(is_held_out(date.fromisoformat(iso)) for _, iso in shown)
    assert "char/s" in output.err
    assert "bits/char" in output.err

    held_out = date_pairs(400, 9, held_out=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f" {text}\n" for text, _ in held_out)))
    assert translate("--model", out, "--beam", 3) == 0
    answers = capsys.readouterr().out.splitlines()
    right = sum(iso == answer for (_, iso), answer in zip(held_out, answers, strict=True))
    assert right >= LEARNT * 400


def test_pairs_of_a_file_are_learnt(tmp_path, capsys):
    path = tmp_path / "pairs.tsv"
    words = ["".join("abcd"[n // 4**k % 4] for k in range(3)) for n in range(64)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [f"{words[n]}\t{words[n].upper()}!\n" for n in order]
    path.write_text("".join(lines), encoding="utf-8")
    sizes = ["--hidden", 32, "--embedding", 8, "--batch-size", 8, "--epochs", 60, "--lr", 0.01]
    options = ["--pairs", path, "--validation", 0.25, *sizes, "--reverse", "--dropout", 0.1]
    assert translate("--out", tmp_path, *options) == 0
    output = capsys.readouterr().out
    assert "48 to learn, 16 held out; 5 symbols to read, 8 to write" in output
    (accuracy,) = re.findall(r"exact matches on 16 held-out texts: ([\d.]+) %", output)
    assert float(accuracy) > 80
    assert Translator.load(tmp_path).model.config.reverse_source
    assert translate(words[order[0]], "--model", tmp_path / checkpoint.FILE_NAME) == 0
    assert capsys.readouterr().out == f"{words[order[0]].upper()}!\n"


def test_wrong_translations_are_shown_as_such(tmp_path, capsys):
    assert translate("--out", tmp_path, *SMALL) == 0
    assert len(re.findall(r" instead of \d{4}-\d\d-\d\d$", capsys.readouterr().out, re.M)) == 8


def test_training_is_repeatable(tmp_path, capsys):
    files = []
    for run, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = [*SMALL, "--teacher-forcing", 0.5, "--layers", 2]
        assert translate("--out", tmp_path / run, "--seed", seed, *options) == 0
        assert "time limit" not in capsys.readouterr().out
        files.append((tmp_path / run / checkpoint.FILE_NAME).read_bytes())
    assert files[0] == files[1] != files[2]


def test_training_says_when_its_time_is_over(tmp_path, capsys):
    start = time.monotonic()
    options = [*SMALL, "--epochs", 10**6, "--max-seconds", 0.3, "--beam", 100]
    assert translate("--out", tmp_path, *options) == 0
    assert time.monotonic() - start < 20  # a million epochs would take days
    output = capsys.readouterr().out
    assert "the time limit of 0.3 s ended the training after 0.0% of it" in output
    words = r"exact matches on (\d+) held-out texts \(no time is left for ([\d,]+)\): "
    done, left = re.search(words, output).groups()
    assert int(done) + int(left.replace(",", "")) == 2000


def signal_at(step, number, monkeypatch):
    """Send a signal to this process during a training step."""
    forward, steps = Seq2SeqLSTM.forward, itertools.count(1)

    def counted(*arguments):
        if next(steps) == step:
            signal.raise_signal(number)
        return forward(*arguments)

    monkeypatch.setattr(Seq2SeqLSTM, "forward", counted)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_was_learnt_outlives_an_interruption(tmp_path, name, capsys, monkeypatch):
    number = getattr(signal, name)
    signal_at(3, number, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        translate("--out", tmp_path, *SMALL)
    assert stop.value.code == 128 + number
    monkeypatch.undo()
    assert f"stopped by {name} after 96.0% of the training; what" in capsys.readouterr().err
    torch.manual_seed(0)
    pairs = date_pairs(200, 0)
    known = [*pairs, *date_pairs(2000, 0, held_out=True)]
    expected = Translator.for_pairs(known, 8, embedding_size=4)
    some = train(expected, pairs, TrainingOptions(64, 1, 1e9, 6e-3, 1.0))
    for _ in range(3):
        next(some)
    weights = Translator.load(tmp_path).model.state_dict()
    torch.testing.assert_close(weights, expected.model.state_dict(), rtol=0, atol=0)


def test_an_older_model_stays_until_a_whole_one_replaces_it(folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / checkpoint.FILE_NAME
    path.write_bytes(old := (folder / checkpoint.FILE_NAME).read_bytes())
    words = refusal(["--out", tmp_path, *SMALL], capsys)
    assert f"--out {tmp_path} has model.safetensors already; --overwrite" in words
    signal_at(2, signal.SIGINT, monkeypatch)
    with pytest.raises(SystemExit):
        translate("--out", tmp_path, *SMALL, "--overwrite")
    assert path.read_bytes() == old
    with pytest.raises(SystemExit) as stop:
        translate("--out", tmp_path, *SMALL, "--overwrite", "--lr", 1e9)
    assert stop.value.code == 1
    assert "worse than that of a model that knows nothing" in capsys.readouterr().err
    assert path.read_bytes() == old
    assert translate("--out", tmp_path, *SMALL, "--overwrite") == 0
    assert path.read_bytes() != old
    assert os.listdir(tmp_path) == [checkpoint.FILE_NAME]


@pytest.mark.parametrize("beam", [1, 3])
def test_texts_come_from_arguments_or_standard_input(folder, beam, capsys, monkeypatch):
    assert translate("--model", folder, "twelve", " one ", "two", "--beam", beam) == 0
    assert capsys.readouterr().out == "12\n1\n2\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("eleven\r\ntwo\none"))
    assert translate("--model", folder, "--beam", beam) == 0
    assert capsys.readouterr().out == "11\n2\n1\n"


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_backends_agree(folder, backend, capsys):
    assert translate("one", "twelve", "--out", folder, "--backend", backend) == 0
    assert capsys.readouterr().out == "1\n12\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one", "--beam", 0], "--beam: expected a number from 1 to 1000, without fraction, got"),
        (["one", "--beam", 1001], "--beam: expected a number from 1 to 1000"),
        (["one", "--beam", "wide"], "--beam: expected a number from 1 to 1000"),
        (["one", "--pairs", "file"], "--pairs are for training"),
        (["one", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["one", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_useless_texts_and_options_are_refused(folder, arguments, words, capsys):
    assert words in refusal(["--model", folder, *arguments], capsys)


def test_a_text_that_cannot_be_translated_stops_no_other(folder, capsys, monkeypatch):
    lines = ["one", "", "Two", "two", " \t", "twelve"] * 100
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as stop:
        translate("--model", folder)
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == ["1", "", "", "2", "", "12"] * 100
    notices = output.err.splitlines()
    assert len(notices) == 300
    assert notices[0].startswith("rnnfast translate: text 2: expected a text of at least one")
    assert notices[1].startswith("rnnfast translate: text 3: 'Two' cannot be read: unknown")
    assert notices[-1].startswith("rnnfast translate: text 599: expected")
    with pytest.raises(SystemExit):
        translate("--model", folder, "", "eleven")
    assert capsys.readouterr().out == "\n11\n"


def test_no_standard_input_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "got none" in refusal(["--model", folder], capsys)


@pytest.mark.parametrize(("write", "words"), DAMAGED[:5])
def test_useless_models_are_refused(tmp_path, write, words, capsys):
    assert "does not exist" in refusal(["one", "--model", tmp_path / "file"], capsys)
    write(tmp_path / "file")
    assert words in refusal(["one", "--model", tmp_path / "file"], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", __file__], "exists"),
        (["--pairs", "nowhere"], "--pairs nowhere: No such file"),
        (["--pairs", "/"], "--pairs /: Is a directory"),
        (["--pairs", ""], "--pairs: expected the name of a file or folder, got an empty one"),
        (["--pairs", __file__], "line 1: expected source, tab, target"),
        (["--validation", 1], "between 0 and 1"),
        (["--teacher-forcing", 1.5], "from 0 to 1"),
        (["--hidden", 0], "1 or more"),
        (["--lr", "fast"], "above zero"),
        (["--dropout", 1], "below 1"),
    ],
)
def test_useless_training_options_are_refused(tmp_path, arguments, words, capsys):
    assert words in refusal(["--out", tmp_path, *arguments], capsys)


@pytest.mark.parametrize("times", [1, 5])
def test_too_few_pairs_are_refused(tmp_path, times, capsys):
    path = tmp_path / "pairs.tsv"
    path.write_text("one\t1\n" * times, encoding="utf-8")
    assert "--pairs: too few pairs: 1 distinct" in refusal(
        ["--pairs", path, "--out", tmp_path], capsys
    )


def test_no_source_is_learnt_and_held_out():
    pairs = [(f"{number}", f"{number}!") for number in range(10)] * 5
    learnt, held_out = split_pairs(pairs, 0.2)
    assert held_out == [("8", "8!"), ("9", "9!")]
    assert learnt == [pair for pair in pairs if pair not in held_out]
    pairs = [("a", "1"), ("b", "2"), ("c", "3"), ("c ", "4"), (" a", "5"), ("c", "3")]
    learnt, held_out = split_pairs(pairs, 0.4)
    assert learnt == [("a", "1"), ("b", "2"), (" a", "5")]
    assert held_out == [("c", "3"), ("c ", "4")]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        translate("--help")
    assert stop.value.code == 0
    output = capsys.readouterr().out
    for words in ("examples:", "03/04/1997 is 3 April", "standard input", "(default: 128)"):
        assert words in output
