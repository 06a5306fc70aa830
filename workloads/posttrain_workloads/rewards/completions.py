"""What a completion says, in whichever form TRL hands it over.

It must not judge it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or the messages that the model wrote (and, with tools, those that it got in between)."""


def text_of(completion: Completion) -> str:
    """Return the text of a completion: of the last message where there are several."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str) or content is None:  # a message that only calls a tool has none
        return content or ""
    return "".join(part["text"] for part in content if part["type"] == "text")
