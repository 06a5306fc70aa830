"""The program that grades mathematical answers: a server that forks workers, and what a worker does.

It owns math-verify: its configuration, what is done in another way with the same result because it takes less time,
its warm-up, and the limits on its time and memory. It must not import anything else of posttrain: it is started as a
file, and its workers must be cheap to lose.

    python -P grader.py
    python -P grader.py make-tables    # in the build of an image: what the first server of an installation does, too

Standard input is a Unix socket. Each message on it carries the worker's end of a channel, and forks a worker, which has
math-verify imported already. On its channel a worker reads requests of one JSON line, `{"config", "gold", "answers",
"seconds"}`, and writes one line for the gold, `{"parsed"}`, and, where that is true, one for each answer, `{"correct"}`
(null: math-verify raised, told in `error`). When a worker has ended, the server writes a last line on its channel,
`{"died": <signal or 0>}`.

Time is the worker's own processor time, so that a busy machine changes no grade. It is limited twice: a signal that
raises in the worker, and, where the interpreter does not come back to look at it (one multiplication of huge integers
may take minutes), the kernel's own end of the process a tenth of a second later. Nothing outlives the process that
started the server: that one's end closes the sockets, and where a fork of it holds them open still, the server sees
that it has another parent.
"""

from __future__ import annotations

import array
import ctypes
import gc
import hashlib
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

if __name__ == "__main__":
    gc.disable()  # until everything is imported: it looks for garbage a hundred times, and there is none

import math_verify.grader
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended import NormalizationConfig, latex2sympy2
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Add, Expr, I, Integer, Mul, NumberSymbol, Pow, Rational, Symbol, preorder_traversal, simplify

PARENT_CHECK_MILLISECONDS = 500
HARD_LIMIT_EXTRA_SECONDS = 0.1
MEMORY_LIMIT_BYTES = 4 * 2**30
"""Of address space; what needs more is a MemoryError in the worker and a wrong answer."""

Compared = dict[tuple[str, ...], tuple[list[Any], bool]]
"""Answers that were compared with one solution, parsed, and whether they equal it, by the texts that were parsed."""

_PR_SET_PDEATHSIG = 1
_PRIME = 2**61 - 1
"""Large, so that a function that is not 0 has hardly ever the residue 0; where it has, SymPy is asked."""
_ALLOCATIONS = 100_000
"""Until Python looks for garbage: it finds hardly any among SymPy's objects."""
_DIGITS = 15
_UNITS = "sympy.physics.units"
_TENSORS = "sympy.tensor.tensor"
_Result = TypeVar("_Result")


class OutOfTime(BaseException):
    """The limit on processor time is reached; a BaseException, as math-verify takes any other for a wrong answer."""


def answer_config(boxed: Any) -> list[LatexExtractionConfig]:
    """Return how an answer is found in a completion: in LaTeX, in a box before anything else, and never without sign.

    The values are those of open-r1, which takes `boxed="all"` for its accuracy and True (no box is opened but by the
    parser) for its rewards of length.
    """
    normalization = NormalizationConfig(
        nits=False, malformed_operators=False, basic_latex=True, equations=True, boxed=boxed, units=True
    )
    return [
        LatexExtractionConfig(
            normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
        )
    ]


_ANSWERS = {"accuracy": answer_config("all"), "length": answer_config(True)}


def parse_gold(config: str, gold: str) -> list[Any]:
    """Return a parsed solution, empty where there is nothing to parse.

    For the rewards of length open-r1 reads LaTeX only, so that a bare `6` is nothing; here such a solution is read as
    for the accuracy.
    """
    if config == "length":
        parsed = parse(gold, [LatexExtractionConfig()], extraction_mode="first_match", parsing_timeout=None)
        if parsed:
            return list(parsed)
    return list(parse(gold, extraction_mode="first_match", parsing_timeout=None))


def is_correct(config: str, gold: list[Any], answer: str, compared: Compared) -> bool:
    """Tell whether a completion's answer equals the parsed solution; `compared` is what was found of others."""
    parsed = parse(answer, _ANSWERS[config], extraction_mode="first_match", parsing_timeout=None)
    text = tuple(part for part in parsed if isinstance(part, str))
    former, correct = compared.get(text, (None, False))
    if parsed != former:
        correct = bool(verify(gold, parsed, timeout_seconds=None))
        compared[text] = parsed, correct
    return correct


# --- The same grades in less time -------------------------------------------------------------------------------------


class QuickConverter(latex2sympy2._Latex2Sympy):  # type: ignore[misc]
    """latex2sympy's converter, with the same results.

    The parser predicts by ANTLR's SLL first, which it remembers from one text to the next, where the full prediction is
    made anew each time; it gives the same tree or a syntax error (antlr4.atn.PredictionMode). What fails is done again
    as latex2sympy does it. A whole number is read without parser, and without Python's compiler.
    """

    _prediction = PredictionMode.SLL

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self._prediction
        return parser

    def parse(self, latex_str: str) -> Any:
        if latex_str.isascii() and latex_str.isdigit():
            return self.parse_number(latex_str)
        try:
            return super().parse(latex_str)
        except Exception:  # a syntax error is of no narrower class
            self._prediction = PredictionMode.LL
            return super().parse(latex_str)

    def parse_number(self, text: str) -> Any:
        digits = text.replace(",", "")
        return Integer(digits) if digits.isascii() and digits.isdigit() else super().parse_number(text)


def simplify_unless_known(difference: Any) -> Any:
    """Simplify what math-verify compares with zero, unless it is known not to be; then return another such number."""
    if isinstance(difference, Expr):
        if difference.is_number:
            # Before it is evaluated SymPy takes (0 + sqrt(2))**2 - 2 not to be zero, or contradicts itself.
            if is_not_zero(difference) or difference.doit().is_zero is False:
                return Integer(1)
        elif residue(difference):
            return Integer(1)
    return simplify(difference)


def is_not_zero(number: Any) -> bool:
    """Tell whether a number of roots, powers, pi and e is known not to be zero from its first digits.

    SymPy evaluates such a number with as many digits as it takes to be sure of those that it returns, and marks a part
    that it is not sure of by a precision of one bit. To ask it for `is_zero` may take the minimal polynomial of a part.
    """
    exact = (Add, Mul, Pow, Rational, NumberSymbol, type(I))
    if not all(isinstance(part, exact) for part in preorder_traversal(number)):
        return False
    try:
        parts = number.evalf(_DIGITS).as_real_imag()
    except Exception:  # of no narrower class; simplifying it may still succeed
        return False
    return any(part.is_Float and part != 0 and part._prec > 1 for part in parts)


def residue(expression: Any) -> int | None:
    """Return the value of a rational function at one point, modulo a prime; None where it is none, or has none there.

    A function whose value there is not 0 is not 0 everywhere, so that simplifying it cannot give 0.
    """
    match expression:
        case Rational() if expression.q % _PRIME:
            return int(expression.p) * pow(int(expression.q), -1, _PRIME) % _PRIME
        case Symbol():
            return int.from_bytes(hashlib.blake2b(expression.name.encode(), digest_size=8).digest()) % _PRIME
        case Pow(exp=Integer()):
            base = residue(expression.base)
            if base is None or (base == 0 and expression.exp.is_negative):
                return None
            return pow(base, int(expression.exp), _PRIME)
        case Add() | Mul():
            total = int(isinstance(expression, Mul))
            for term in expression.args:
                value = residue(term)
                if value is None:
                    return None
                total = (total * value if isinstance(expression, Mul) else total + value) % _PRIME
            return total
    return None


class Unimported(types.ModuleType):
    """A module of SymPy that is imported when it is asked for anything but certain classes.

    SymPy imports it when it first adds or simplifies, only to ask of each part whether it is of one of these classes.
    Before the module is imported there can be no such part, so that other classes without any object do as well, and
    the 0.1 to 0.2 s that the import takes are spared to every worker.
    """

    def __init__(self, name: str, classes: Iterable[str]) -> None:
        super().__init__(name)
        self.__dict__.update({each: type(each, (), {}) for each in classes})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import statement asks for __path__
            raise AttributeError(name)
        del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def make_quick() -> None:
    """Let math-verify use what is above in this process."""
    latex2sympy2._Latex2Sympy = QuickConverter
    math_verify.grader.simplify = simplify_unless_known
    for name, classes in ((_UNITS, ("Quantity", "Unit")), (_TENSORS, ("TensAdd", "TensExpr"))):
        sys.modules.setdefault(name, Unimported(name, classes))


# --- A worker ---------------------------------------------------------------------------------------------------------


def work(channel: socket.socket) -> None:
    """Answer requests until the other end is closed."""
    for line in channel.makefile("rb"):
        request = json.loads(line)
        config, seconds = request["config"], request["seconds"]
        gold: list[Any] = []
        compared: Compared = {}
        with suppress(OutOfTime):
            gold = within(seconds, parse_gold, config, request["gold"])
        _tell(channel, {"parsed": bool(gold)})
        for answer in request["answers"] if gold else ():
            _tell(channel, grade(config, gold, answer, compared, seconds=seconds))


def grade(config: str, gold: list[Any], answer: str, compared: Compared, *, seconds: float) -> dict[str, Any]:
    """Return the grade of one answer; one that takes too long is wrong, as with math-verify's own time limit."""
    try:
        return {"correct": within(seconds, is_correct, config, gold, answer, compared)}
    except OutOfTime:
        return {"correct": False}
    except Exception as error:  # math-verify catches its own; what comes through costs no other answer its grade
        return {"correct": None, "error": f"{type(error).__name__}: {error}"}


def within(seconds: float, function: Callable[..., _Result], *args: Any) -> _Result:
    """Return what `function` returns.

    Raises:
        OutOfTime: it has used up its processor time.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds + HARD_LIMIT_EXTRA_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _raise_out_of_time(*_: object) -> NoReturn:
    raise OutOfTime


def _tell(channel: socket.socket, reply: dict[str, Any]) -> None:
    channel.sendall(json.dumps(reply).encode() + b"\n")


# --- The server -------------------------------------------------------------------------------------------------------


class Server:
    """The workers that live, by the descriptors of their channels."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._parent = os.getppid()
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        self._workers: dict[int, tuple[int, socket.socket]] = {}
        self._poll = select.poll()
        self._wakeup, wakeup_writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(wakeup_writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_writer)
        self._poll.register(self._wakeup, select.POLLIN)
        self._poll.register(control.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Fork a worker for each channel that comes, and end those whose channel is closed, until `control` is."""
        while os.getppid() == self._parent:
            for descriptor, _ in self._poll.poll(PARENT_CHECK_MILLISECONDS):
                if descriptor == self._control.fileno():
                    channel = self._receive()
                    if channel is None:
                        return
                    self._fork(channel)
                elif descriptor == self._wakeup:
                    self._reap()
                elif descriptor in self._workers:
                    self._poll.unregister(descriptor)
                    os.kill(self._workers[descriptor][0], signal.SIGKILL)

    def end(self) -> None:
        """Kill every worker, and return when none is left."""
        for pid, _ in self._workers.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _receive(self) -> socket.socket | None:
        data, ancillary, _, _ = self._control.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
        if not data:
            return None
        [(_, _, content)] = ancillary
        return socket.socket(fileno=array.array("i", content)[0])

    def _fork(self, channel: socket.socket) -> None:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(channel, server=server)
            finally:
                os._exit(1)
        self._workers[channel.fileno()] = (pid, channel)
        self._poll.register(channel.fileno(), 0)  # reported only when the other end is closed

    def _become_worker(self, channel: socket.socket, *, server: int) -> NoReturn:
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server:
                os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGVTALRM, _raise_out_of_time)
        self._control.close()
        for _, other in self._workers.values():
            other.close()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work(channel)
        os._exit(0)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        for descriptor, (pid, channel) in list(self._workers.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == 0:
                continue
            del self._workers[descriptor]
            with suppress(KeyError):  # it was killed because its channel is closed
                self._poll.unregister(descriptor)
            with suppress(OSError):
                _tell(channel, {"died": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0})
            channel.close()


def warm_up() -> None:
    """Do once what every worker would do anew: compile the expressions, and fill the parser's tables."""
    _load_beside("parser_tables").use_tables(lambda formula: parse_gold("accuracy", formula))
    for config in _ANSWERS:
        gold = parse_gold(config, _SAMPLE)
        is_correct(config, gold, rf"\boxed{{{_SAMPLE.strip('$')}}}", {})
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)
    gc.enable()


def _load_beside(name: str) -> Any:
    """Import a file of this folder, which is not on the path: some of its names are those of libraries."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SAMPLE = r"$\frac{1}{2} + \sqrt{3}x^2$"


def main() -> None:
    """Serve on standard input."""
    make_quick()
    logging.disable()  # math-verify warns of each answer that it cannot read, and of each option that open-r1 sets
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the process that started this one
    warm_up()
    if sys.argv[1:] == ["make-tables"]:
        return
    server = Server(socket.socket(fileno=0))
    try:
        server.serve()
    finally:
        server.end()
    os._exit(0)  # the interpreter would take a tenth of a second to free SymPy's objects


if __name__ == "__main__":
    main()
