"""Which part of a completion decides the grade: often the answer after the reasoning, which is a tenth of the text.

It owns the proof that the grade is the same; it must not guess: where a condition does not hold, all of the text is
graded.

Under the configuration of grader.py, math-verify 0.9 takes the match that ends last among three expressions, tried
before all others: `\boxed{...}` up to the last brace of the text; a formula between delimiters with a box in it; and
`final answer is <formula>. I hope`. So when the part after `</think>` has a box and a brace after it, the winner ends
in that part. It could still begin before it in two ways: a formula whose delimiter was opened in the reasoning (those
within a line cannot, as the part begins with a line break), and several boxes that math-verify joins to one answer,
as it does when they are near to each other.
"""

from __future__ import annotations

_END = "</think>"
_BOXES = ("\\boxed", "\\fbox")
_JOINED_WITHIN = 70
"""Characters between two boxes from which on math-verify never joins them."""


def deciding_part(text: str) -> str:
    """Return the part of a completion that math-verify gives the same answer for as for all of it."""
    reasoning, end, part = text.rpartition(_END)
    begin = part.find("\\boxed{")
    if not end or not part.startswith("\n") or begin < 0 or part.rfind("}") <= begin + len("\\boxed{"):
        return text
    if _formula_crosses(reasoning, part) or _box_is_near(reasoning, part):
        return text
    return part


def _formula_crosses(reasoning: str, part: str) -> bool:
    """Tell whether a formula of several lines may begin in the reasoning and end after it."""
    if "\\]" in part and reasoning.rfind("\\[") > reasoning.rfind("\\]"):
        return True
    opened = reasoning.rfind("$$")
    if opened < 0 or "$$" not in part:
        return False
    crossing = reasoning[max(opened - 1, 0) :] + part[: part.find("$$")]
    return "\\boxed{" in crossing or "I hope" in part


def _box_is_near(reasoning: str, part: str) -> bool:
    """Tell whether the last box of the reasoning may be joined with the first one after it."""
    last = max(reasoning.rfind(box) for box in _BOXES)
    if last < 0:
        return False
    brace = reasoning.find("{", last)
    if brace < 0 or reasoning[last:brace].rstrip() not in _BOXES:
        return False  # it has no braces, and math-verify joins no such box
    first = min(at for box in _BOXES if (at := part.find(box)) >= 0)
    return len(reasoning) - _closing(reasoning, brace) - 1 + len(_END) + first < _JOINED_WITHIN


def _closing(text: str, brace: int) -> int:
    """Return where the brace that is opened at `brace` is closed; the end of the text if nowhere."""
    depth = 0
    for at in range(brace, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return len(text)
