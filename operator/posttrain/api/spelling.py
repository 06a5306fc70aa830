"""How names and values are put into words: the nearest valid name to a mistyped one, a value as a person wrote it.

It must not know any resource.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_READABLE_LENGTH = 60


def plain(name: str) -> str:
    """Return `name` without what differs between the ways to spell it: case, underscores, hyphens."""
    return re.sub(r"[-_ ]", "", name).lower()


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` most likely means, or None where none is near."""
    by_plain = {plain(candidate): candidate for candidate in candidates}
    wanted = plain(word)
    if wanted in by_plain:
        return by_plain[wanted]
    close = difflib.get_close_matches(wanted, by_plain, n=1, cutoff=0.7)
    if close:
        return by_plain[close[0]]
    longer = [name for name in by_plain if len(wanted) >= 3 and (name.startswith(wanted) or wanted.startswith(name))]
    return by_plain[longer[0]] if len(longer) == 1 else None


def join_names(names: Sequence[str], *, conjunction: str = "and") -> str:
    """Return `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {conjunction} {names[-1]}"


def first_sentence(text: str) -> str:
    """Return the first sentence of a description, with its full stop."""
    return re.split(r"(?<=[^.]\.)\s", text, maxsplit=1)[0]


def write_value(value: Any) -> str:
    """Return a value on one line as it may stand in YAML: JSON."""
    return json.dumps(value, ensure_ascii=False)


def describe_value(value: Any) -> str:
    """Return what a value is, in words: `the string "8"`, `a list`."""
    match value:
        case None:
            return "nothing"
        case bool():
            return write_value(value)
        case int() | float():
            return f"the number {write_value(value)}"
        case str():
            return f"the string {_shorten(write_value(value))}"
        case list():
            return f"a list, {_shorten(write_value(value))}"
    return f"a mapping, {_shorten(write_value(value))}"


def _shorten(text: str) -> str:
    return text if len(text) <= _READABLE_LENGTH else f"{text[: _READABLE_LENGTH - 1]}…"
