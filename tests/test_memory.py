"""Training memory beside torch.nn's."""

from benchmarks.memory import measure


def test_training_takes_at_most_six_tenths_of_torchs_memory() -> None:
    size = (100, 64, 512)
    assert 0 < measure("rnnfast", *size) <= 0.6 * measure("torch", *size)
