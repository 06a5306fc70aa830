"""The logs of a local run, by attempt and rank, and those of its services, which outlive attempts.

It owns which files belong to an attempt and how they are followed; it must not interpret what stands in them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import UserError
from posttrain.local.state import RunFolder, lock_holder
from posttrain.plan.names import PREPARE_ATTEMPT, attempt_of, prepare_name

_POLL_SECONDS = 0.3


def find_logs(folder: RunFolder, *, attempt: int | None) -> list[Path]:
    """Return the logs of an attempt's pods, by node; 0 is prepare's.

    Without a number: those of the newest attempt, and then those of the run's services.

    Raises:
        UserError: there is none.
    """
    by_attempt: dict[int, list[Path]] = {}
    services: list[Path] = []
    for file in folder.logs.glob("*.log"):
        job = file.stem.rsplit("-", 2)[0]  # <job>-master-0, <job>-worker-<n>
        if (of := attempt_of(folder.name, name=job)) is not None:
            by_attempt.setdefault(of, []).append(file)
        elif file.stem.rsplit("-", 1)[0] == prepare_name(folder.name):
            by_attempt.setdefault(PREPARE_ATTEMPT, []).append(file)
        else:
            services.append(file)
    if not by_attempt and not services:
        raise UserError(f"run {folder.name!r} has written no log yet")
    if attempt is None:
        newest = by_attempt[max(by_attempt)] if by_attempt else []
        return [*sorted(newest, key=_by_node), *sorted(services)]
    if attempt not in by_attempt:
        known = ", ".join(str(number) for number in sorted(by_attempt))
        raise UserError(f"run {folder.name!r} has no log of attempt {attempt}; there are logs of: {known} (0: prepare)")
    return sorted(by_attempt[attempt], key=_by_node)


def _by_node(file: Path) -> tuple[bool, int]:
    kind, number = file.stem.rsplit("-", 2)[-2:]
    return kind == "worker", int(number)


def read_lines(folder: RunFolder, *, attempt: int | None, rank: int | None, follow: bool) -> Iterator[str]:
    """Yield the lines of an attempt's logs; `follow`: until nobody executes the run any more.

    Without a number following goes on with the next attempt's. The lines of a rank bear its number, which is left out
    where only that rank is asked for.

    Raises:
        UserError: there is no such log.
    """
    read: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        running = follow and lock_holder(folder) is not None
        files = find_logs(folder, attempt=attempt)
        for file in {**read, **dict.fromkeys(files, 0)}:
            lines, read[file] = _read_on(file, start=read.get(file, 0), whole_lines=running)
            chosen = [text for line in lines if (text := _of_rank(line, rank=rank)) is not None]
            if chosen and len({*read, *files}) > 1 and file != shown:
                yield f"==> {file.stem} <=="
                shown = file
            yield from chosen
        if not running:
            return
        time.sleep(_POLL_SECONDS)


def _read_on(file: Path, *, start: int, whole_lines: bool) -> tuple[list[str], int]:
    """Return the lines from a position on, and the position after them."""
    with file.open("rb") as stream:
        stream.seek(start)
        data = stream.read()
    if whole_lines:
        data = data[: data.rfind(b"\n") + 1]
    return data.decode(errors="replace").splitlines(), start + len(data)


def _of_rank(line: str, *, rank: int | None) -> str | None:
    if rank is None:
        return line
    prefix = f"[rank {rank}] "
    return line.removeprefix(prefix) if line.startswith(prefix) else None
