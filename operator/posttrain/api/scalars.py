"""What a plain YAML scalar means to kubectl: the rules of resolve.go in go.yaml.in/yaml/v2, then of Go's JSON.

It must not know nodes, tags or quoting, which are the loader's.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from decimal import Decimal

_WORDS: Mapping[str, bool | float | None] = {
    **{form: True for word in ("y", "yes", "true", "on") for form in (word, word.capitalize(), word.upper())},
    **{form: False for word in ("n", "no", "false", "off") for form in (word, word.capitalize(), word.upper())},
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **{f"{sign}{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_DOT_FLOAT = re.compile(r"\.[0-9]+(_[0-9]+)*([eE][-+]?[0-9]+(_[0-9]+)*)?")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGERS = (
    (re.compile(r"([-+]?)0[xX]([0-9a-fA-F]{1,64})"), 16),
    (re.compile(r"([-+]?)0[bB]([01]{1,64})"), 2),
    (re.compile(r"([-+]?)0[oO]?([0-7]{1,64})"), 8),
    (re.compile(r"([-+]?)(0|[1-9][0-9]{0,63})"), 10),
    (re.compile(r"0b([-+])([01]{1,64})"), 2),
)


def resolve_plain(text: str) -> str | int | float | None:
    """Return what an unquoted scalar without a tag stands for; dates are strings.

    Floats stay floats here, infinite and undefined ones too: a key and a value treat them differently.
    """
    if text in _WORDS:
        return _WORDS[text]
    # Go, like Python, allows an underscore between digits where a number begins with a dot, and anywhere elsewhere.
    if _DOT_FLOAT.fullmatch(text):
        return _finite_or_text(text, text=text)
    if text[0] not in "+-0123456789":
        return text
    digits = text.replace("_", "")
    for pattern, base in _INTEGERS:
        if match := pattern.fullmatch(digits):
            number = int(match[1] + match[2], base)
            # Go reads an int64, or without a sign an uint64; what is larger is a float, if it looks like one.
            if -(2**63) <= number < 2**63 or (number < 2**64 and match[1] == ""):
                return number
    return _finite_or_text(digits, text=text) if _FLOAT.fullmatch(digits) else text


def _finite_or_text(digits: str, *, text: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else text


def to_json_number(value: float) -> int | float:
    """Return what is left of a finite float after Go wrote it into JSON: no fraction and below 1e21 is an integer."""
    if value.is_integer() and abs(value) < 1e21:
        return int(Decimal(repr(value)))
    return value


def format_float_key(value: float) -> str:
    """Return a float key as sigs.k8s.io/yaml writes it: strconv.FormatFloat(value, 'g', -1, 32)."""
    if math.isnan(value):
        return ".nan"
    try:
        single = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        single = math.copysign(math.inf, value)
    if math.isinf(single):
        return "-.inf" if single < 0 else ".inf"
    shortest = next(
        text
        for digits in range(9)
        if struct.pack("f", float(text := f"{single:.{digits}e}")) == struct.pack("f", single)
    )
    mantissa, exponent = shortest.split("e")
    if -4 <= int(exponent) < 6 or single == 0:
        return f"{Decimal(shortest):f}"
    return f"{mantissa}e{exponent}"
