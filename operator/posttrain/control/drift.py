"""Whether an object is still what the plan wants: only then is a write saved.

It owns that comparison, over the plan's fields alone: what the API server filled in and what others added is theirs.
"""

from __future__ import annotations

from typing import Any

from posttrain.plan.quantities import parse_quantity
from posttrain.plan.types import Manifest

_QUANTITIES = frozenset({"limits", "requests"})
"""Maps whose values the API server writes in its own way: `1024Mi` comes back as `1Gi`."""


def has_drifted(observed: Manifest, *, wanted: Manifest) -> bool:
    """Return whether a field that the plan names is missing or has another value."""
    return not _holds(observed, wanted)


def _holds(observed: Any, wanted: Any) -> bool:
    # Most of an object is just as it is wanted: two equal parts are told by one comparison. Both sides are JSON data.
    if observed == wanted:
        return True
    if isinstance(wanted, dict):
        return isinstance(observed, dict) and all(
            _holds_field(name, observed.get(name), value) for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(observed, list)
            and len(observed) == len(wanted)
            and all(_holds(there, value) for there, value in zip(observed, wanted, strict=True))
        )
    return False


def _holds_field(name: str, observed: Any, wanted: Any) -> bool:
    if name == "ownerReferences":
        known = {reference.get("uid"): reference for reference in observed or ()}
        return all(_holds(known.get(reference["uid"]), reference) for reference in wanted)
    if name in _QUANTITIES and isinstance(wanted, dict) and isinstance(observed, dict):
        return observed.keys() >= wanted.keys() and all(
            parse_quantity(str(observed[resource])) == parse_quantity(str(amount))
            for resource, amount in wanted.items()
        )
    if wanted in ({}, []) and observed is None:
        # The API server drops what is empty.
        return True
    return _holds(observed, wanted)
