"""Benchmarks: `python -m benchmarks.compare`, `python -m benchmarks.gpu_check`, pytest suites."""
