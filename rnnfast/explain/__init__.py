"""Explains recurrent layers: a step with all its numbers, vanishing gradients, recorded gates."""

from rnnfast.explain.gradients import compare_gradients, gradient_norms
from rnnfast.explain.plots import plot_gates, plot_gradients, plot_step
from rnnfast.explain.record import GateRecord, record_gates
from rnnfast.explain.step import Step, elman_step, gru_step, lstm_step

__all__ = [
    "GateRecord",
    "Step",
    "compare_gradients",
    "elman_step",
    "gradient_norms",
    "gru_step",
    "lstm_step",
    "plot_gates",
    "plot_gradients",
    "plot_step",
    "record_gates",
]
