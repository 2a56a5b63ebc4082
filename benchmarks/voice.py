"""Voice activity on synthetic features of sound: the data, and a detector to train on them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnfast

BANDS, HIDDEN, FRAME_SECONDS = 40, 64, 0.01
WEIGHTS = ("float32", "int8")
"""The types of frozen weights that are compared."""


def synthetic(frames: int, streams: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns log energies (frames, streams, 40), and where there is speech (frames, streams).

    Speech and pauses follow a Markov chain. Speech has two formants that move, and syllables. The
    noise below it drifts, and has bursts over all bands, so loudness alone does not tell.
    """
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    changes = torch.rand(frames, streams, generator=chance) < 0.02  # about every half second
    speech = (changes.cumsum(0) + torch.randint(2, (streams,), generator=chance)) % 2 == 1
    t = FRAME_SECONDS * torch.arange(frames).unsqueeze(1)
    phases = 6.28 * torch.rand(3, streams, generator=chance)
    syllables = 0.6 + 0.4 * torch.sin(6.28 * 4 * t + phases[0])
    low, high = (
        middle + 4 * torch.sin(6.28 * rate * t + phase)
        for middle, rate, phase in ((9, 1.3, phases[1]), (23, 0.9, phases[2]))
    )
    bands = torch.arange(BANDS)
    formants = sum(torch.exp(-((bands - f.unsqueeze(2)) ** 2) / 8) for f in (low, high))
    drift = normal(streams) + 0.03 * normal(frames, streams).cumsum(0)
    bursts = 2.0 * (torch.rand(frames, streams, generator=chance) < 0.05)
    x = normal(frames, streams, BANDS) + (drift + bursts).unsqueeze(2)
    return x + 1.5 * (speech * syllables).unsqueeze(2) * formants, speech


class Detector(nn.Module):
    """The logit of speech for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes features (T, B, 40), and returns logits (T, B)."""
        return self.head(self.lstm(x)[0]).squeeze(2)


def trained(steps: int) -> Detector:
    torch.manual_seed(0)
    detector = Detector()
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.01)
    for step in range(steps):
        x, speech = synthetic(100, 32, seed=step)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(detector(x), speech.float()).backward()
        optimizer.step()
    return detector


@torch.inference_mode()
def accuracies(detector: Detector, frames: int, streams: int) -> dict[str, float]:
    """Returns the shares of frames, of streams it was not trained on, that are judged rightly.

    "loudness" is what the best threshold of the mean over all bands would reach.
    """
    x, speech = synthetic(frames, streams, seed=-1)
    found = {weights: rnnfast.freeze(detector, weights)(x) > 0 for weights in WEIGHTS}
    loudness = x.mean(2)
    thresholds = loudness.flatten().quantile(torch.linspace(0, 1, 101))
    found["loudness"] = max(
        (loudness > each for each in thresholds), key=lambda says: (says == speech).sum()
    )
    return {name: (says == speech).double().mean().item() for name, says in found.items()}
