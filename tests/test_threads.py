"""Threads: their creation, waiting and failure; the number of cores; forked processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from covering import quick_values

import rnnfast


def run(script: str, *arguments: object, timeout: float = 120, **environment: str) -> str:
    """Runs a program in a new process and returns what it printed.

    A process that hangs is killed together with its children.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
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
@pytest.mark.parametrize(
    ("threads", "cores"),  # 0: the cores that there are
    [
        *[(2, 64), (3, 0), (16, 64)],
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in [(2, 0), (3, 64), (4, 0), (4, 64), (8, 0), (8, 64), (16, 0)]
        ),
    ],
)
def test_calls_create_no_threads(threads: int, cores: int) -> None:
    """Calls alone, and alternating with torch.mm.

    OpenMP ends and creates threads whenever the size of its teams changes.
    """
    assert run(CREATED, threads, RNNFAST_ASSUME_CORES=str(cores)).split() == ["0", "0"]


def test_a_change_of_affinity_is_noticed() -> None:
    script = """
        import os, time, torch, rnnfast
        from rnnfast.backend import EXTENSION

        def cores(expected):
            limit = time.monotonic() + 10
            while EXTENSION.usable_cores() != expected and time.monotonic() < limit:
                time.sleep(0.01)
            return EXTENSION.usable_cores()

        first = EXTENSION.usable_cores()
        all_cores = os.sched_getaffinity(0)
        assert first <= len(all_cores)
        os.sched_setaffinity(0, {min(all_cores)})
        assert cores(1) == 1
        os.sched_setaffinity(0, all_cores)
        assert cores(first) == first
        EXTENSION.assume_cores(5)
        assert EXTENSION.usable_cores() == 5
    """
    run(script)


@pytest.mark.parametrize(
    "binding", ["OMP_PROC_BIND=close", pytest.param("OMP_PLACES=cores", marks=pytest.mark.full)]
)
def test_bound_threads_use_all_cores(binding: str) -> None:
    """OpenMP binds the calling thread to one core, and each of the others to another."""
    script = "import rnnfast; print(rnnfast.backend.EXTENSION.usable_cores())"
    name, value = binding.split("=")
    assert int(run(script, **{name: value})) == len(os.sched_getaffinity(0))


# With more threads than cores, a crew of as many threads as cores does the work.
CREW = """
    import os, threading, time
    import torch, rnnfast
    from rnnfast.backend import EXTENSION

    torch.manual_seed(0)
    layer, x = rnnfast.LSTM(64, 512, backend="fused"), torch.randn(12, 8, 64)

    def work():
        y, _ = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), layer.parameters())]

    def tasks():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(1)
    expected = work()
    torch.set_num_threads(64)
    EXTENSION.assume_cores(3)
    with torch.no_grad():
        before = tasks()
        y, _ = layer(x)
        assert tasks() == before + 2
        assert torch.equal(y, expected[0])
    for _ in range(5):
        assert all(map(torch.equal, work(), expected))

    # nothing of torch's runs in these threads, so OpenMP has no teams there
    at_first, results = tasks(), []
    for _ in range(3):
        thread = threading.Thread(target=lambda: results.append(layer(x)[0]))
        thread.start()
        thread.join()
    limit = time.monotonic() + 10
    while tasks() > at_first and time.monotonic() < limit:
        time.sleep(0.01)
    assert all(torch.equal(y, expected[0]) for y in results)
    print(len(results), tasks() - at_first)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed in /proc")
def test_a_crew_ends_with_its_thread() -> None:
    assert run(CREW) == "3 0\n"


def test_threads_leave_cores_that_others_need() -> None:
    """With processes spinning on all cores, a second thread would wait for a core at every step."""
    script = """
        import os, subprocess, sys, time, torch, rnnfast
        from rnnfast.backend import EXTENSION

        cores = EXTENSION.usable_cores()
        torch.set_num_threads(cores)
        layer, x = rnnfast.LSTM(256, 256, backend="fused"), torch.randn(100, 8, 256)
        spin = [sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(spin) for _ in range(cores)]
        try:
            limit = time.monotonic() + 60
            while EXTENSION.free_cores() == cores and cores > 1 and time.monotonic() < limit:
                with torch.no_grad():
                    layer(x)
            print(cores, EXTENSION.free_cores())
        finally:
            for other in others:
                other.kill()
    """
    cores, free = map(int, run(script).split())
    assert free < cores or cores == 1


V1 = "36 31 0:30 {root} /fs/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "41 31 0:38 {root} /fs/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cores"),
    [
        ("0::/a/b\n", V2.format(root="/"), {"unified/a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", V2.format(root="/"), {"unified/a/b/cpu.max": "max 100000"}, math.inf),
        # the limits of parent groups count as well
        (
            "0::/a/b\n",
            V2.format(root="/"),
            {"unified/a/b/cpu.max": "800000 100000", "unified/a/cpu.max": "300000 100000"},
            3,
        ),
        # a container sees its own group as the root of the mount, or as the root of everything
        ("0::/docker/1\n", V2.format(root="/docker/1"), {"unified/cpu.max": "200000 100000"}, 2),
        ("0::/\n", V2.format(root="/"), {"unified/cpu.max": "400000 100000"}, 4),
        (
            "5:cpuset:/x\n4:cpu,cpuacct:/a\n0::/\n",
            V1.format(root="/") + V2.format(root="/"),
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "50000"},
            5,
        ),
        (
            "4:cpuacct,cpu:/a\n",
            V1.format(root="/"),
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        ("", "", {}, math.inf),
    ],
)
def test_quotas_of_control_groups(
    groups: str, mounts: str, files: dict[str, str], cores: float, tmp_path: Path
) -> None:
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert rnnfast.backend.EXTENSION.quota_cores(str(tmp_path)) == cores


@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    yield rnnfast.backend.EXTENSION.assume_cores
    rnnfast.backend.EXTENSION.assume_cores(0)


@pytest.mark.parametrize("nth_barrier", [1, 3, 8])
@pytest.mark.parametrize("crew", [False, True], ids=["team", "crew"])
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (1, 4), (2, 2), (3, 2)], ids=str)
def test_an_error_of_any_thread_is_raised(
    grid: tuple[int, int],
    crew: bool,
    nth_barrier: int,
    threads: None,
    cores: Callable[[int], None],
) -> None:
    """The call raises it while other threads wait, and the next call works."""
    extension = rnnfast.backend.EXTENSION
    count = grid[0] * grid[1]
    torch.set_num_threads(count + 1)
    cores(count if crew else 64)
    layer, x = rnnfast.LSTM(64, 256, backend="fused"), torch.randn(5, 8, 64)
    expected = layer(x)[0]
    for thread in range(count):
        with pytest.raises(RuntimeError, match=f"thread {thread} of {count} failed"):
            extension.fail_in_team(*grid, thread, nth_barrier)
        assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("grid", [(1, 4), (2, 2)], ids=str)
def test_threads_that_wait_for_long_leave_their_cores(grid: tuple[int, int], threads: None) -> None:
    """They are woken when the wait ends, here by an error."""
    torch.set_num_threads(5)
    for thread in (0, 3):
        before = time.process_time()
        with pytest.raises(RuntimeError, match="failed"):
            rnnfast.backend.EXTENSION.fail_in_team(*grid, thread, 4, seconds=0.5)
        assert time.process_time() - before < 0.25  # four threads wait, parked


# A parent that runs the work named by its second argument, and forks a child for each further
# argument, which names the child's work. The child prints the number of warnings, the number of
# threads, and whether a layer gives the same results as in the parent.
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
@quick_values(
    threads=[2, 4],
    work=[
        ("lstm mm", ["lstm", "mm lstm dropout torch_nn train mm", "train"]),
        ("mm torch_nn", ["lstm mm", "train torch_nn mm dropout"]),
    ],
)
def test_children_of_several_threads_answer(threads: int, work: tuple[str, list[str]]) -> None:
    """In a child the parent's team does not exist; several threads would wait for ever."""
    before, children = work
    *found, parent = run(FORK, threads, before, *children).splitlines()
    assert found == ["1 1 same"] * len(children)
    assert parent == str(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_one_thread_are_not_warned() -> None:
    assert run(FORK, 1, "lstm mm", "lstm train").splitlines() == ["0 1 same", "1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_that_asks_for_several_threads() -> None:
    """The parent used several threads once; the child has been warned."""
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


# The parent's threads call layers while it forks. What they hold at that moment, such as a lock, is
# never released in the child.
FORK_WHILE_OTHERS_CALL = """
    import os, threading, time, torch, rnnfast

    torch.set_num_threads(2)
    layer, x = rnnfast.LSTM(64, 256, backend="fused"), torch.randn(3, 2, 64)
    stop = False

    def call():
        with torch.no_grad():
            while not stop:
                layer(x)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    hung = 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            thread = threading.Thread(target=layer, args=(x,))
            thread.start()
            thread.join()
            os._exit(0)
        limit = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > limit:
                os.kill(child, 9)
                os.waitpid(child, 0)
                hung += 1
                break
            time.sleep(0.001)
    stop = True
    print(hung)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_a_process_whose_threads_are_at_work() -> None:
    assert run(FORK_WHILE_OTHERS_CALL) == "0\n"


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
