"""The error that a user can act on, and the checks that raise it."""

from __future__ import annotations

import math


class FalconError(Exception):
    """Something outside the code is wrong: a file, a setting, the machine.

    The message names what was wrong, where, and what to do. Commands print it without a traceback and exit with 1.
    It is one line of printable text: names in files from outside may hold anything, control characters included.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in super().__str__())


def check_number(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> None:
    """Refuses what is not a finite number within bounds.

    Args:
      name: what the number is, as the user knows it.
      value: an int or float.
      low: the least that is allowed.
      high: the most that is allowed.
      above: what it must exceed.

    Raises:
      FalconError: it is no number, not finite, or out of bounds.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and value >= low and value <= high and value > above:  # type: ignore[operator, arg-type]
        return
    bounds = [
        f"above {above:,.10g}" if above > -math.inf else "",
        f"at least {low:,.10g}" if low > -math.inf else "",
        f"at most {high:,.10g}" if high < math.inf else "",
    ]
    raise FalconError(f"{name} must be a number {' and '.join(filter(None, bounds))}".rstrip() + f", got {value!r}")


def check_seed(name: str, value: int) -> None:
    """Refuses a seed outside [0, 2^32): the range that every random generator in use takes, so that a seed is one seed.

    Raises:
      FalconError: it is outside.
    """
    if not 0 <= value < 1 << 32:
        raise FalconError(f"{name} must be from 0 to {(1 << 32) - 1} (2^32 - 1), got {value}")


def check_part(part: tuple[int, int]) -> None:
    """Refuses (i, n), the i-th of n parts of a job array, where i is not from 0 to n - 1.

    Raises:
      FalconError: it is not.
    """
    index, count = part
    if not 0 <= index < count:
        raise FalconError(f"shard {index}/{count}: the first number counts from 0 and must be below the second")


def check_text(name: str, value: str) -> None:
    """Refuses what the system passed on as bytes that are not UTF-8, which no tokenizer, JSON or library takes.

    Raises:
      FalconError: it holds such bytes.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FalconError(f"{name} is not UTF-8 text, from character {error.start + 1} on: {value[:80]!a}") from None
