"""Threads that are created, and processes that are forked off one with several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


def run(script: str, *arguments: object, timeout: float = 120) -> str:
    """Runs a program in a process of its own and returns what it printed.

    A process that hangs is ended, with those that it has forked off.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, errors = process.communicate()
        pytest.fail(f"hung after {timeout} s; it had printed\n{output}\n{errors}")
    assert process.returncode == 0, errors
    return output


CREATED = """
    import os, sys
    import torch, rnnfast, rnnfast.models

    torch.set_num_threads(int(sys.argv[1]))
    rnnfast.use_backend("fused").__enter__()
    lstm, gru = rnnfast.LSTM(512, 512), rnnfast.GRU(128, 128, 2, bidirectional=True)
    cell, generator = rnnfast.LSTMCell(64, 64), rnnfast.models.CharLSTM(50, 64)
    x, x_gru, matrix = torch.randn(6, 4, 512), torch.randn(6, 8, 128), torch.randn(300, 300)

    def work(with_mm):
        for layer, data in ((lstm, x), (gru, x_gru)):
            with torch.no_grad():
                layer(data)
            layer(data)[0].sum().backward()
            if with_mm:
                torch.mm(matrix, matrix)
        cell(x_gru[0, :, :64])
        generator.generate(torch.tensor([1, 2]), 3, seed=0)

    def tasks():
        return set(os.listdir("/proc/self/task"))

    for with_mm in (False, True):
        for _ in range(3):
            work(with_mm)
        seen = tasks()
        at_first = len(seen)
        for _ in range(12):
            work(with_mm)
            seen |= tasks()
        print(len(seen) - at_first)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed in /proc")
@pytest.mark.parametrize("threads", [3, 4, 8, 16])
def test_calls_create_no_threads(threads: int) -> None:
    """Alone, and in alternation with torch.mm.

    OpenMP ends and creates threads where the size of its teams changes from call to call.
    """
    assert run(CREATED, threads).split() == ["0", "0"]


# A parent that does what its second argument names, and forks a child for each further argument,
# which names what that does. The child prints how many warnings there were, the number of threads,
# and whether a layer computes what it computed in the parent.
FORK = """
    import os, sys, time, warnings
    import torch, rnnfast

    threads, before, *children = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    layer = rnnfast.LSTM(256, 256, backend="fused")
    small = rnnfast.GRU(4, 4, 2, dropout=0.5, backend="fused")
    x, large = torch.randn(20, 16, 256), torch.randn(700, 700)

    def lstm():
        with torch.no_grad():
            return layer(x)[0]

    def train():
        layer(x)[0].sum().backward()

    def torch_nn():
        with torch.no_grad():
            torch.nn.LSTM(256, 256)(x)

    def mm():
        torch.mm(large, large).exp().sum()

    def dropout():
        small(torch.randn(50, 400, 4))

    def in_child(names):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in names:
                globals()[name]()
            result = lstm()
            lstm()
        words = [str(w.message) for w in caught if "fork" in str(w.message)]
        same = expected is None or torch.equal(result, expected)
        print(len(words), torch.get_num_threads(), "same" if same else "other", flush=True)

    for name in before.split():
        globals()[name]()
    expected = lstm() if "lstm" in before else None
    for after in children:
        child = os.fork()
        if child == 0:
            in_child(after.split())
            os._exit(0)
        limit = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > limit:
                os.kill(child, 9)
                sys.exit(f"a child hung that did {after}")
            time.sleep(0.01)
    lstm()
    print(torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    ("before", "children"),
    [
        ("lstm mm", ["lstm", "mm lstm dropout torch_nn train mm", "train"]),
        ("mm torch_nn", ["lstm mm", "train torch_nn mm dropout"]),
    ],
)
@pytest.mark.parametrize("threads", [2, 4])
def test_children_of_several_threads_answer(threads: int, before: str, children: list[str]) -> None:
    """In a child the parent's team is not there: on several threads OpenMP would wait for ever."""
    *found, parent = run(FORK, threads, before, *children).splitlines()
    assert found == ["1 1 same"] * len(children)
    assert parent == str(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_one_thread_are_not_warned() -> None:
    assert run(FORK, 1, "lstm mm", "lstm train").splitlines() == ["0 1 same", "1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_asks_for_several_threads() -> None:
    """Of a parent that had several once, and in a child that has been told."""
    script = """
        import os, torch, rnnfast

        layer, x = rnnfast.LSTM(256, 256, backend="fused"), torch.randn(20, 16, 256)
        torch.set_num_threads(4)
        expected = layer(x)[0]
        torch.set_num_threads(1)
        child = os.fork()
        if child == 0:
            for _ in range(2):
                torch.set_num_threads(4)
                same = torch.equal(layer(x)[0], expected)
            os._exit(0 if same and torch.get_num_threads() == 1 else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run(script).endswith("0\n")


def test_a_generator_that_was_made_before_the_fork() -> None:
    script = """
        import os, torch
        import rnnfast.models

        torch.set_num_threads(2)
        model = rnnfast.models.CharLSTM(60, 256)
        prompt = torch.tensor([1, 2])
        expected = model.generate(prompt, 30, seed=3)
        child = os.fork()
        if child == 0:
            same = torch.equal(model.generate(prompt, 30, seed=3), expected)
            os._exit(0 if same else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run(script) == "0\n"


def test_threads_of_a_child_have_teams_of_their_own() -> None:
    script = """
        import os, threading, torch, rnnfast

        torch.set_num_threads(2)
        layer, x = rnnfast.LSTM(256, 256, backend="fused"), torch.randn(20, 16, 256)
        expected = layer(x)[0]
        child = os.fork()
        if child == 0:
            results = []
            thread = threading.Thread(target=lambda: results.append(layer(x)[0]))
            thread.start()
            thread.join()
            os._exit(0 if torch.equal(results[0], expected) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run(script) == "0\n"
