"""Write counts and lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 scan`, `2,000 scans`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def count_part(number: int, whole: int, noun: str) -> str:
    """Return a part of a whole: `all 5 scans`, `3 of 5 scans`."""
    return f"all {count(whole, noun)}" if number == whole > 1 else f"{number:,} of {count(whole, noun)}"


def format_share(share: float) -> str:
    """Return a share from 0 to 1 in percent. Only 0 gives `0 %`, and only 1 gives `100 %`."""
    percent = 100 * share
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    digits = 0 if percent in (0, 100) or 10 <= percent < 99 else 1
    return f"{percent:.{digits}f} %"


def join_words(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
