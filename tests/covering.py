"""Covering arrays: few rows that contain every combination of values of some dimensions.

A test of all combinations takes long. `quick_values` and `quick_pairs` leave a covering array in
the default tests, and mark the other combinations full.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[str, Any]


def covering(
    dimensions: Mapping[str, Sequence[Any]],
    wanted: Sequence[tuple[str, ...]],
    allowed: Callable[[Row], bool],
    tries: int = 3,
) -> list[Row]:
    """Returns rows, each with a value per dimension, that contain every allowed combination.

    The algorithm is greedy, like AETG (Cohen, Dalal, Fredman, Patton, IEEE Transactions on Software
    Engineering 23(7), 1997). A row begins with a missing combination. It then takes the other
    dimensions in a random order, and for each the value that completes most missing combinations.
    The best of several such rows is kept. The result is the same in every process.

    Args:
        dimensions: The values of each dimension.
        wanted: The dimensions whose values are to occur in every combination.
        allowed: Whether a row of some of the dimensions can be part of an allowed row. For any
            allowed row, every other dimension must have a value that fits.
        tries: The number of rows of which the best is kept.
    """
    generator = random.Random(0)
    missing: dict[tuple[str, ...], set[tuple[Any, ...]]] = {
        names: {
            values
            for values in product(*(dimensions[name] for name in names))
            if allowed(dict(zip(names, values, strict=True)))
        }
        for names in wanted
    }
    of_dimension = {name: [c for c in wanted if name in c] for name in dimensions}

    def gain(row: Row, name: str) -> int:
        """Returns how many missing combinations the value of ``name`` would complete."""
        count = 0
        for names in of_dimension[name]:
            if missing[names] and all(other in row for other in names):
                count += tuple(row[other] for other in names) in missing[names]
        return count

    def extended(row: Row) -> tuple[int, Row]:
        total, names = 1, [name for name in dimensions if name not in row]
        generator.shuffle(names)
        for name in names:
            fitting = [value for value in dimensions[name] if allowed({**row, name: value})]
            gains = [(gain({**row, name: value}, name), value) for value in fitting]
            best = max(count for count, _ in gains)
            row = {
                **row,
                name: generator.choice([value for count, value in gains if count == best]),
            }
            total += best
        return total, row

    rows: list[Row] = []
    for names in wanted:
        # A fixed order, that of the dimensions' values: the order of a set differs between runs.
        for values in product(*(dimensions[name] for name in names)):
            if values not in missing[names]:
                continue
            start = dict(zip(names, values, strict=True))
            _, row = max((extended(start) for _ in range(tries)), key=lambda found: found[0])
            for others in wanted:
                missing[others].discard(tuple(row[name] for name in others))
            rows.append({name: row[name] for name in dimensions})
    return rows


def quick_values(**dimensions: Sequence[Any]) -> pytest.MarkDecorator:
    """Gives a test all combinations. Those of the default tests contain every value."""
    return _quick(1, dimensions)


def quick_pairs(**dimensions: Sequence[Any]) -> pytest.MarkDecorator:
    """Gives a test all combinations. Those of the default tests contain every pair of values.

    The dimension "device" is that of the targets in targets.py.
    """
    return _quick(2, dimensions)


def _quick(size: int, dimensions: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    places = {name: range(len(values)) for name, values in dimensions.items()}
    quick = covering(places, [*combinations(dimensions, size)], lambda row: True)
    params = []
    for row in product(*places.values()):
        values = [dimensions[name][place] for name, place in zip(dimensions, row, strict=True)]
        marks = [] if dict(zip(dimensions, row, strict=True)) in quick else [pytest.mark.full]
        marks += [pytest.mark.cuda] * ("cuda" in values)
        name = "-".join(getattr(value, "__name__", str(value)) for value in values)
        params.append(pytest.param(*values, marks=marks, id=name))
    indirect = [name for name in dimensions if name == "device"]
    return pytest.mark.parametrize(tuple(dimensions), params, indirect=indirect)
