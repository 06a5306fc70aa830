"""Kubernetes quantities as numbers.

It owns the suffixes; it must not decide what a quantity is used for.
"""

from __future__ import annotations

from decimal import Decimal

_SUFFIXES = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15,
    "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50,
    "Ei": Decimal(2) ** 60,
}


def parse_quantity(text: str) -> Decimal:
    """Return the number that a quantity such as `500m`, `8` or `64Gi` stands for.

    Raises:
        ValueError: the text is not a quantity.
    """
    number = text.rstrip("mkMGTPEi")
    suffix = text[len(number) :]
    if suffix not in _SUFFIXES or not number or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r} is not a Kubernetes quantity such as 500m, 8 or 64Gi")
    return Decimal(number) * _SUFFIXES[suffix]
