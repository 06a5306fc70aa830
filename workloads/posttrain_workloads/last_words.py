"""The last words of a rollout server: what went wrong, from the process of vLLM that knows it.

It owns which of vLLM's errors are the end of a server, and the message that its container then leaves; it must not
import vLLM. vLLM's server itself ends with "Engine core initialization failed. See root cause above", whatever it was.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

_FATAL = re.compile(r"(EngineCore|WorkerProc) (failed|encountered a fatal error)")
"""vllm 0.31, v1/engine/core.py:1433 and v1/executor/multiproc_executor.py:948; what a process survives is called
otherwise. If vLLM comes to say it differently, a server ends with the end of its log as its message."""
_LINES, _LINE_CHARACTERS = 4, 800
"""Of an error, from its first line on. The run's status shows the last five of a message (plan/pods.py)."""


def leave_last_words(target: Path) -> None:
    """Let this process, and each that is forked of it, write into `target` why it ends, where none has done so yet.

    A handler would not do: vLLM configures its loggers, and with them their handlers, anew in each process.
    """
    make = logging.getLogRecordFactory()

    def make_and_look(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and _FATAL.match(str(record.msg)):
            _write_first(target, f"{str(record.msg).rstrip('.')}: {describe_error(error)}\n")
        return record

    logging.setLogRecordFactory(make_and_look)


def describe_error(error: BaseException) -> str:
    """Return the error's first lines, and the first one of the error that it was raised for."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    lines = _lines(error)
    if first is not error:
        lines = [*lines[: _LINES - 1], f"raised for {_lines(first)[0]}"]
    return "\n".join(line[:_LINE_CHARACTERS] for line in lines[:_LINES])


def _lines(error: BaseException) -> list[str]:
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    if not str(error).strip() and frames:  # an assertion without a word
        text += f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
    return [line for line in text.splitlines() if line.strip()]


def _write_first(target: Path, text: str) -> None:
    """Write the text if the file is empty: what other processes find when the first has ended is no cause."""
    with suppress(OSError), target.open("a") as file:  # vLLM goes on to its end as without us
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_size == 0:
            file.write(text)
            file.flush()
