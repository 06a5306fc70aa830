"""Which part of a completion decides the grade: often one line after the reasoning, out of hundreds.

It owns the proof that the grade is the same; it must not guess: where a condition does not hold, all of the text is
graded.

Under the configuration of grader.py, math-verify 0.9 takes the match that ends last among three expressions, tried
before all others: `\\boxed{...}` from the first box to the last brace of the text; a formula between delimiters with a
box in it; and `final answer is <formula>. I hope`. So when there is a box and a brace behind it after `</think>`, the
winner ends in the text from the line of the first such box on. It could still begin before that line in three ways: a
formula whose delimiter was opened before (those within a line cannot); a box before, which math-verify joins with one
that is near to it; and the words `final answer is` at the end of the line before.
"""

from __future__ import annotations

_END = "</think>"
_BOXES = ("\\boxed", "\\fbox")
_JOINED_WITHIN = 70
"""Characters between two boxes from which on math-verify never joins them."""


def deciding_part(text: str) -> str:
    """Return the part of a completion that math-verify gives the same answer for as for all of it."""
    end = text.rfind(_END)
    box = text.find("\\boxed", end)
    if end < 0 or not text.startswith("\\boxed{", box) or text.rfind("}") <= box + len("\\boxed{"):
        return text
    if _boxes_join(text[:end], text[end:box], text[box:]):
        return text
    # The line of the box; where its formula begins on a line before, all lines after the reasoning.
    for line in (text.rfind("\n", end, box), text.find("\n", end, box)):
        if line >= 0 and not _formula_crosses(text[:line], text[line:]):
            return text[line:]
    return text


def _formula_crosses(before: str, part: str) -> bool:
    """Tell whether a formula, or the words that introduce one, may begin before the part and end in it."""
    if "\\]" in part and before.rfind("\\[") > before.rfind("\\]"):
        return True
    if "I hope" in part:
        return True
    opened = before.rfind("$$")
    if opened < 0 or "$$" not in part:
        return False
    return "\\boxed{" in before[max(opened - 1, 0) :] + part[: part.find("$$")]


def _boxes_join(reasoning: str, between: str, part: str) -> bool:
    """Tell whether the last box of the reasoning may be joined with the one that `part` begins with."""
    if "\\fbox" in between or "\\fbox" in part:
        return True
    last = max(reasoning.rfind(box) for box in _BOXES)
    brace = reasoning.find("{", last)
    if last < 0 or brace < 0 or reasoning[last:brace].rstrip() not in _BOXES:
        return False  # there is none, or one without braces, which is never joined
    closing = _closing(reasoning, brace)
    return closing is None or len(reasoning) - closing - 1 + len(between) < _JOINED_WITHIN


def _closing(text: str, brace: int) -> int | None:
    """Return where the brace that is opened at `brace` is closed."""
    depth = 0
    for at in range(brace, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return None
