"""Results as lines of JSON. Each is printed at once, so it is kept even if the run is killed."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


def emit(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


@contextmanager
def reported(**where: object) -> Iterator[None]:
    """Prints an exception inside as a line, with the facts `where`, and suppresses it."""
    try:
        yield
    except Exception as error:
        last = traceback.format_exc().splitlines()[-8:]
        emit(**where, error=f"{type(error).__name__}: {error}", traceback=last)


def parse(text: str) -> dict[str, object] | None:
    """The facts of a line that `emit` wrote; None for any other."""
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None
