"""Builds the programs of a test cluster into the cache: `python -m tests.cluster.build [--until TIME] [PART...]`.

It owns the Go builds, their order and their time; it must not start what it builds, and no test builds anything.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.local.container import Command, Container, Ended
from tests.cluster.components import PARTS, Component, why_not_here

_LAST_LINES = 20
_LOCK_POLL_SECONDS = 0.5


class BuildError(Exception):
    """A Go build failed."""


class OutOfTimeError(Exception):
    """The time that was given is over."""


@dataclass(frozen=True)
class Budget:
    """Time that ends; None: there is no end."""

    deadline: float | None

    def left(self) -> float | None:
        """Return the seconds that are left.

        Raises:
            OutOfTimeError: there are none.
        """
        if self.deadline is None:
            return None
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise OutOfTimeError
        return seconds


def build_part(part: str, *, budget: Budget, report: Callable[[str], None]) -> None:
    """Build what is missing of a part.

    Raises:
        BuildError: `go build` failed; the message has its last lines.
        OutOfTimeError: the budget ended first. What is complete stays, and Go's own cache keeps the rest.
    """
    for component in PARTS[part]:
        if not component.is_built():
            budget.left()
            build_component(component, budget=budget, report=report)


def build_component(component: Component, *, budget: Budget, report: Callable[[str], None]) -> None:
    """Build one component; it appears in the cache by one rename. Errors as `build_part`."""
    folder = component.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), budget=budget, report=report):
        if component.is_built():  # another process was faster
            return
        for stale in folder.parent.glob(f"{folder.name}.*.tmp"):  # only a killed build leaves one
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".tmp") as making:
            made = Path(making) / "made"
            for name, package in component.needed_packages.items():
                started = time.monotonic()
                _go(
                    (
                        "go",
                        "build",
                        "-trimpath",
                        "-ldflags",
                        component.ldflags,
                        "-o",
                        str(made / "bin" / name),
                        package,
                    ),
                    component=component,
                    log=Path(making) / f"{name}.log",
                    budget=budget,
                )
                report(f"built {name}: {time.monotonic() - started:.0f} s")
            for module, subfolder in component.manifests.items():
                source = Path(_go_text("list", "-m", "-f", "{{.Dir}}", module, component=component)) / subfolder
                shutil.copytree(source, made / "manifests")
            _make_writable(made)
            made.rename(folder)


def _go(argv: Sequence[str], *, component: Component, log: Path, budget: Budget) -> None:
    # Under a shim: a compiler does not go on when this process is killed.
    ends: list[Ended | None] = []
    command = Command(argv=tuple(argv), env=_go_environment(), cwd=component.module_folder)
    seconds = budget.left()
    container = Container(command, log=log, on_end=ends.append)
    if not container.wait(timeout_seconds=seconds):
        container.terminate(grace_seconds=0)
        container.wait()
        raise OutOfTimeError
    if (ended := ends[0]) is None or ended.exit_code != 0:
        code = "was killed" if ended is None else f"ended with exit code {ended.exit_code}"
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        raise BuildError(
            "\n".join([f"`{' '.join(argv)}` in {component.module_folder} {code}:", *(f"    {line}" for line in lines)])
        )


def _go_environment() -> dict[str, str]:
    return {**os.environ, "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}


def _go_text(*args: str, component: Component) -> str:
    return subprocess.run(
        ("go", *args), cwd=component.module_folder, env=_go_environment(), check=True, capture_output=True, text=True
    ).stdout.strip()


def _make_writable(folder: Path) -> None:
    # The module cache is read-only, and so are copies of its folders.
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)


@contextmanager
def _locked(file: Path, *, budget: Budget, report: Callable[[str], None]) -> Iterator[None]:
    with file.open("a") as handle:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                budget.left()
                if not told:
                    report(f"waiting for another process that builds {file.stem}")
                    told = True
                time.sleep(_LOCK_POLL_SECONDS)
            else:
                break
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Build the parts in order; a part that there was no time for is named, and is no failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.build", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--until", type=float, metavar="TIME", help="stop building then (seconds since 1970)")
    args = parser.parse_args(argv)
    budget = Budget(None if args.until is None else time.monotonic() + args.until - time.time())
    for part in [part for part in PARTS if part in args.parts or not args.parts]:
        if reason := why_not_here(part):
            print(f"NOT RUN: {part}: {reason}", flush=True)
            continue
        try:
            build_part(part, budget=budget, report=lambda line: print(line, flush=True))
        except OutOfTimeError:
            print(f"NOT RUN: {part}: no time left to build it; another `make cluster-binaries` goes on", flush=True)
        except BuildError as error:
            print(f"{error}\nNOT RUN: {part}: its build failed", file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
