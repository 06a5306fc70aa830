"""Rules over several fields of one object: each in Python, in CEL for the API server, and as one sentence for people.

It owns how such a rule is written and found broken; it must not know any particular resource.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_READS = re.compile(r"\bself((?:\.[A-Za-z]\w*)+)(\()?")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something that must hold within an object; `holds` gets its JSON data with every default filled in."""

    field: str
    """Where the mistake is shown, below the object: `parallelism.offload`."""
    message: str
    cel: str
    holds: Callable[[Mapping[str, Any]], bool]

    @property
    def reads(self) -> frozenset[str]:
        """Dotted paths below the object that the rule looks at, as its CEL names them."""
        paths = set()
        for match in _READS.finditer(self.cel):
            path, call = match.groups()
            paths.add((path.rpartition(".")[0] if call else path).removeprefix("."))
        return frozenset(paths - {""})


def broken_rules(rules: tuple[Rule, ...], data: Mapping[str, Any]) -> list[Rule]:
    """Return the rules that do not hold for `data`, in their order."""
    return [rule for rule in rules if not rule.holds(data)]
