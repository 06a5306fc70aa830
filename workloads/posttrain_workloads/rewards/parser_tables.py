"""What latex2sympy's parser has learned from common formulas, kept in a file beside the parser.

It owns the file: what is in it, where it lies, and when it is made. It must not import anything else of posttrain, as
it belongs to the process of grader.py.

ANTLR predicts which rule of the grammar comes next by a table that it fills while it parses (All(*), Parr et al. 2014):
the first formula of a new kind takes 10 to 60 ms, one more of it a few. An entry depends on nothing but the grammar, so
a table that was filled by another process predicts the same. The file is trusted as a .pyc is, which lies in the same
folder: who may write there may change the parser itself.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from antlr4.atn.ATNConfig import ATNConfig
from antlr4.atn.ATNSimulator import ATNSimulator
from antlr4.atn.ATNState import ATNState
from antlr4.atn.SemanticContext import SemanticContext
from antlr4.PredictionContext import PredictionContext
from latex2sympy2_extended.antlr_parser import PSParser

FORMULAS = (
    *("12", "-3", "0.5", "1,000", r"50\%", "1/2", r"\frac{1}{2}", r"-\frac{3}{4}", "2^{10}", "5!", r"2 \cdot 3"),
    *(r"\sqrt{3}", r"2\sqrt{2}", r"\sqrt[3]{5}", r"\frac{\sqrt{3}}{2}", r"\frac{1 + \sqrt{5}}{2}"),
    *(r"\frac{3}{2} - \frac{\sqrt{5}}{2}", r"\frac{\sqrt{2}+1}{\sqrt{3}-1}", r"\frac{(\sqrt{2}+1)(\sqrt{3}+1)}{2}"),
    *(r"\pi", r"\frac{2\pi}{3}", r"4\pi + 2", "e^2", r"\ln 2", r"\binom{5}{2}", r"60^\circ", "3 + 4i", "10^3"),
    *("x", "2x + 1", "ab", "x^2 - 3x + 2", "(x+1)(x-2)", r"\frac{x+1}{x-1}", r"\frac{x^2 + 2x + 1}{(x-1)(x+3)}", "a_1"),
    *("x = 2", "y = 2x + 3", "3y = 6x - 1", r"y = \frac{1}{2}x - 4", r"y = 2x + \frac{1}{3}", r"x \le 3", "1 < x < 2"),
    *("1, 2", r"\{1, 2, 3\}", "(1, 2)", "(1, -2)", r"\left(1, \frac{2}{3}\right)", "(1, 2, 3)", r"1 \pm \sqrt{2}"),
    *("[0, 1]", "[0, 1)", r"(-\infty, 2)", r"[-1, 2) \cup (3, \infty)", r"\left[\frac{1}{2}, \infty\right)"),
    *(r"\sin x", r"\sin^2(x)", r"2\cos(2x) - 1", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\text{even}"),
)
"""The forms that most answers of data sets of mathematics have. Each takes a part of a millisecond of every start."""


def _make_config(*values: Any) -> ATNConfig:
    config = ATNConfig.__new__(ATNConfig)
    (
        config.state,
        config.alt,
        config.context,
        config.semanticContext,
        config.reachesIntoOuterContext,
        config.precedenceFilterSuppressed,
    ) = values
    return config


_SINGLES: dict[str, object] = {
    "none": SemanticContext.NONE,
    "empty": PredictionContext.EMPTY,
    "error": ATNSimulator.ERROR,
    "make": _make_config,
}
"""Objects that ANTLR compares by identity; and a function, by whose name pickle would import this package."""

_NAMES = {id(single): name for name, single in _SINGLES.items()}


def use_tables(parse: Callable[[str], object]) -> None:
    """Fill the parser's tables in this process from the file; where there is none, make it, by parsing with `parse`.

    Where the file cannot be written, the tables are filled as the graders go.
    """
    # A part of the hash of every state; without it a state has another hash in each process.
    type(SemanticContext.NONE).__hash__ = _hash_of_none  # type: ignore[assignment]
    path = tables_path()
    # Whatever is wrong with the file: it is made anew.
    with suppress(Exception):
        restore(path.read_bytes())
        return
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        try:
            with partial.open("xb") as file:
                for formula in FORMULAS:
                    parse(f"${formula}$")
                file.write(tables())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def tables_path() -> Path:
    """Return where the tables lie: a name for each version of the grammar, of the formulas and of Python."""
    parser = Path(sys.modules[PSParser.__module__].__file__ or "")
    digest = hashlib.blake2b(parser.read_bytes() + Path(__file__).read_bytes(), digest_size=8).hexdigest()
    return parser.parent / "__pycache__" / f"PSParser.{sys.implementation.cache_tag}.posttrain-{digest}.tables"


def tables() -> bytes:
    """Return the tables of this process."""
    content = io.BytesIO()
    filled = [(dfa.decision, dfa.s0, dfa._states) for dfa in PSParser.decisionsToDFA if dfa._states]
    _Pickler(content, protocol=pickle.HIGHEST_PROTOCOL).dump(filled)
    return content.getvalue()


def restore(content: bytes) -> None:
    """Let this process go on from what `tables` returned in another."""
    for decision, start, states in _Unpickler(io.BytesIO(content)).load():
        dfa = PSParser.decisionsToDFA[decision]
        dfa.s0, dfa._states = start, states


def _hash_of_none(_: object) -> int:
    return 0


def _reduce_config(config: ATNConfig) -> tuple[Any, ...]:
    """Tell pickle how to make one in half the time that a class with slots takes: there are tens of thousands."""
    return _make_config, (
        config.state,
        config.alt,
        config.context,
        config.semanticContext,
        config.reachesIntoOuterContext,
        config.precedenceFilterSuppressed,
    )


class _Pickler(pickle.Pickler):
    """Writes the states of the grammar's own automaton, which every process has, as their numbers."""

    dispatch_table = copyreg.dispatch_table | {ATNConfig: _reduce_config}

    def persistent_id(self, value: Any) -> int | str | None:
        return value.stateNumber if isinstance(value, ATNState) else _NAMES.get(id(value))


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: Any) -> Any:
        return _SINGLES[name] if isinstance(name, str) else PSParser.atn.states[name]
