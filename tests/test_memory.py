"""Training memory beside torch.nn's."""

from benchmarks.memory import measure


def least(name: str, size: tuple[int, int, int]) -> float:
    """Of three runs: how the allocator's free blocks happen to lie is not ours to judge."""
    return min(measure(name, *size) for _ in range(3))


def test_training_takes_at_most_six_tenths_of_torchs_memory() -> None:
    size = (100, 64, 512)
    assert 0 < least("rnnfast", size) <= 0.6 * least("torch", size)


def test_recomputing_gates_takes_at_most_three_tenths_of_torchs_memory() -> None:
    size = (200, 64, 512)
    assert 0 < least("rnnfast recompute", size) <= 0.3 * least("torch", size)
