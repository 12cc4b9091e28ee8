"""Report how much of the work is done, from nested steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

OnStep = Callable[[str, float], None]
"""Called with the current step in words and the share of the whole work that is done, from 0 to 1."""


@dataclass(frozen=True)
class Span:
    """A part of the work.

    Attributes:
        on_step: Receives the reports.
        start: Share of the whole work that is done when this part begins.
        end: Share that is done when it ends.
    """

    on_step: OnStep
    start: float = 0.0
    end: float = 1.0

    def report(self, text: str, done: float, whole: float = 1.0) -> None:
        """Report the current step, and that `done` of `whole` of this part is done."""
        share = min(1.0, done / whole) if whole else 1.0
        self.on_step(text, self.start + share * (self.end - self.start))

    def divide(self, *ends: float) -> list[Span]:
        """Return the parts between these shares of this part, from 0 to 1, the last of which is 1."""
        length = self.end - self.start
        places = [self.start + share * length for share in (0.0, *ends)]
        return [Span(self.on_step, *pair) for pair in pairwise(places)]
