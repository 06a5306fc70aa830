"""A recipe of open-r1 or TRL while it is being converted: the keys that are left, and what is said of the others.

It owns what a person hears of a recipe; it must not know what any key means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import UserError


class UnusableRecipe(UserError):
    """A recipe that cannot become a TrainingRun; the message says what is missing."""


@dataclass
class Recipe:
    """The keys of a recipe that nobody has taken yet, and what has been said about those that were."""

    rest: dict[str, Any]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """Return the value of a key, None where it is not given, and take it out."""
        return self.rest.pop(key, None)

    def drop(self, key: str, why: str) -> None:
        """Leave a key out of the resource."""
        self.rest.pop(key, None)
        self.dropped.append((key, why))


def write_decimal(value: Any) -> Any:
    """Return a number as the decimal string that a spec takes, never with an exponent; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    text = f"{value:.9f}".rstrip("0").rstrip(".")
    return text or "0"
