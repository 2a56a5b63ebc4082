"""Covering arrays: few rows in which every combination of values of some dimensions occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

Row = dict[str, Any]


def covering(
    dimensions: Mapping[str, Sequence[Any]],
    combinations: Sequence[tuple[str, ...]],
    allowed: Callable[[Row], bool],
    tries: int = 3,
) -> list[Row]:
    """Rows with a value of each dimension, and in them every allowed combination.

    Greedy, as AETG (Cohen, Dalal, Fredman, Patton, IEEE Transactions on Software Engineering 23(7),
    1997): a row begins with a combination that is missing, and takes the dimensions in a random
    order, of each the value with which most missing combinations occur. The best of some tries
    stays. The result is the same in every process.

    Args:
        dimensions: The values of each dimension.
        combinations: Which dimensions are combined in full.
        allowed: Whether a row of some of the dimensions can be part of an allowed row. Some value
            of every dimension has to fit any allowed row of others.
        tries: How many rows are compared for each one that is taken.
    """
    generator = random.Random(0)
    missing: dict[tuple[str, ...], set[tuple[Any, ...]]] = {
        names: {
            values
            for values in product(*(dimensions[name] for name in names))
            if allowed(dict(zip(names, values, strict=True)))
        }
        for names in combinations
    }
    of_dimension = {name: [c for c in combinations if name in c] for name in dimensions}

    def gain(row: Row, name: str) -> int:
        """How many missing combinations the value of ``name`` completes."""
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
    for names in combinations:
        # in the order of the dimensions' values, as sets have none that is the same everywhere
        for values in product(*(dimensions[name] for name in names)):
            if values not in missing[names]:
                continue
            start = dict(zip(names, values, strict=True))
            _, row = max((extended(start) for _ in range(tries)), key=lambda found: found[0])
            for others in combinations:
                missing[others].discard(tuple(row[name] for name in others))
            rows.append({name: row[name] for name in dimensions})
    return rows
