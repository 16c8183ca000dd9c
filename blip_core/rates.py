"""Shares of cases with Wilson's interval."""

import math
from dataclasses import dataclass

_Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A share of cases."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """In [0, 1]; NaN when there is no case."""
        return self.hits / self.n if self.n else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval; (0, 1) when there is no case."""
        if not self.n:
            return 0.0, 1.0
        z = _Z
        centre = (self.value + z * z / (2 * self.n)) / (1 + z * z / self.n)
        spread = self.value * (1 - self.value) / self.n + z * z / (4 * self.n * self.n)
        half = z * math.sqrt(spread) / (1 + z * z / self.n)
        return max(0.0, centre - half), min(1.0, centre + half)
