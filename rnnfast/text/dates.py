"""Training data for translation: dates in many spellings, each with its ISO 8601 form.

Ambiguous dates have these meanings:

- In a date of numbers only that ends with the year, the day comes before the month: 03/04/1997 is
  3 April 1997. If the year comes first, the month comes before the day.
- A year of two digits lies between 1950 and 2049. All other years have four digits.
"""

from __future__ import annotations

import random
from datetime import date

YEARS = range(1900, 2100)
FORMATS = (
    "{day} {month} {year}",
    "{day:02} {mon} {year}",
    "{weekday}, {day} {month} {year}",
    "{wkd} {day} {mon} {year}",
    "{wkd}, {day:02} {mon} {year}",
    "{ordinal} {month} {year}",
    "the {ordinal} of {month} {year}",
    "{weekday} the {ordinal} of {month}, {year}",
    "{month} {day}, {year}",
    "{mon} {ordinal}, {year}",
    "{month} the {ordinal}, {year}",
    "{weekday}, {month} {day}, {year}",
    "{year}, {month} the {ordinal}",
    "{year} {mon} {day:02}",
    "{day}-{mon}-{year}",
    "{day}.{number}.{year}",
    "{day:02}.{number:02}.{year}",
    "{day}/{number}/{year}",
    "{day:02}/{number:02}/{year}",
    "{year}/{number:02}/{day:02}",
    "{year}-{number}-{day}",
    "{day} {month} '{yy}",
    "{wkd}, {day} {mon} '{yy}",
    "{day}-{mon}-{yy}",
    "{day:02}.{number:02}.{yy}",
    "{day}/{number}/{yy}",
)

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CASES = (str, str, str.lower, str.upper)  # half of the spellings stay unchanged
_TWO_DIGIT_YEARS = range(1950, 2050)
_FOUR_DIGIT_YEARS = range(1000, 10000)
_HELD_OUT = 0.1


def spellings(day: date) -> list[str]:
    """Write a date in all `FORMATS`; those with a two-digit year only if it lies in 1950 to 2049.

    >>> spellings(date(1997, 3, 4))[2]
    'Tuesday, 4 March 1997'

    Raises:
        ValueError: the year does not have four digits.
    """
    if day.year not in _FOUR_DIGIT_YEARS:
        raise ValueError(f"expected a year of four digits, got {day.year}")
    month, weekday = _MONTHS[day.month - 1], _WEEKDAYS[day.weekday()]
    fields = {
        "day": day.day,
        "ordinal": _ordinal(day.day),
        "number": day.month,
        "month": month,
        "mon": month[:3],
        "weekday": weekday,
        "wkd": weekday[:3],
        "year": day.year,
        "yy": f"{day.year % 100:02}",
    }
    short_year = day.year in _TWO_DIGIT_YEARS
    return [form.format(**fields) for form in FORMATS if short_year or "{yy}" not in form]


def is_held_out(day: date) -> bool:
    """Whether a date belongs to the held-out tenth of all dates, which is always the same.

    The choice depends on the date and not on the spelling. A model has therefore not seen a
    held-out date in any spelling.
    """
    scattered = day.toordinal() * 2654435761 % 2**32  # multiplicative hashing (Knuth, 1973)
    return scattered < _HELD_OUT * 2**32


def date_pairs(
    count: int, seed: int, *, held_out: bool = False, years: range = YEARS
) -> list[tuple[str, str]]:
    """Draw random pairs (spelling, ISO 8601 form). The same seed gives the same pairs.

    The days are uniformly distributed over `years`. Each is written in one of its `spellings`,
    unchanged (half of them), in lower case or in upper case.

    Args:
        count: the number of pairs.
        seed: the seed of the random numbers.
        held_out: whether to draw from the held-out dates or from all others.
        years: a range within 1000 to 9999.

    Raises:
        ValueError: a year is out of range, or there is no date to draw from.
    """
    for year in (*years[:1], *years[-1:]):
        if year not in _FOUR_DIGIT_YEARS:
            raise ValueError(f"expected years of four digits, got {year}")
    days = [day for day in _days(years) if is_held_out(day) == held_out]
    if not days:
        raise ValueError(f"there are no such dates in {years}")
    generator = random.Random(seed)
    pairs = []
    for day in generator.choices(days, k=count):
        spelling = generator.choice(spellings(day))
        pairs.append((generator.choice(_CASES)(spelling), day.isoformat()))
    return pairs


def _days(years: range) -> list[date]:
    """Every day of some years."""
    days = []
    for year in years:
        first, last = date(year, 1, 1).toordinal(), date(year, 12, 31).toordinal()
        days += [date.fromordinal(ordinal) for ordinal in range(first, last + 1)]
    return days


def _ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 11th, ..., 21st, ..."""
    suffixes = {1: "st", 2: "nd", 3: "rd"}
    suffix = "th" if number in (11, 12, 13) else suffixes.get(number % 10, "th")
    return f"{number}{suffix}"
