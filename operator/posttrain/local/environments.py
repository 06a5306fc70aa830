"""One Python environment an image, made by uv from the lock beside its Dockerfile and kept under its content hash.

It owns where environments lie and when one is made; it must not import anything that lives in one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import UserError
from posttrain.local.container import Command, open_shim, read_end

COMPLETE_MARKER = ".posttrain-complete"
"""Written last: an environment without it is made anew. No rename: its scripts hold its path."""
_LAST_LINES = 15


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that outlives every run: $POSTTRAIN_CACHE, else ~/.cache/posttrain."""
    given = environ.get("POSTTRAIN_CACHE")
    return Path(given).absolute() if given else Path.home() / ".cache" / "posttrain"


def images_root() -> Path:
    """Return the folder with a folder an image: inside the installed package, or in the source tree around it."""
    package = Path(__file__).parents[1]
    installed = package / "_images"
    return installed if installed.is_dir() else package.parents[1] / "images"


def ensure_environment(
    name: str,
    *,
    cache: Path,
    report: Callable[[str], None],
    images: Path | None = None,
) -> Path:
    """Return the interpreter of an image's environment, which is made first if need be; `report` gets lines on the way.

    `images` is the folder that holds a folder an image. Two processes may ask at once: one makes it, the other waits.

    Raises:
        UserError: there is no such image, no uv, or uv could not install what the lock names.
    """
    requirements = _requirements(name, images=images or images_root())
    folder = environment_folder(name, cache=cache, images=images)
    interpreter = folder / "bin" / "python"
    if (folder / COMPLETE_MARKER).exists():
        return interpreter
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report=report):
        if not (folder / COMPLETE_MARKER).exists():
            _make(folder, requirements=requirements, report=report)
    return interpreter


def environment_folder(name: str, *, cache: Path, images: Path | None = None) -> Path:
    """Return where an image's environment lies, made or not; another content of its lock lies elsewhere.

    Raises:
        UserError: there is no such image.
    """
    return cache / "envs" / f"{name}-{_key(_requirements(name, images=images or images_root()))}"


def _requirements(name: str, *, images: Path) -> Path:
    requirements = images / name / "requirements.txt"
    if not requirements.is_file():
        known = ", ".join(sorted(folder.parent.name for folder in images.glob("*/requirements.txt"))) or "none"
        raise UserError(f"there is no image {name!r} with a requirements.txt in {images}: take one of these: {known}")
    return requirements


def _key(requirements: Path) -> str:
    digest = hashlib.sha256(requirements.read_bytes())
    digest.update(f"\n{platform.python_implementation()} {platform.python_version()} ".encode())
    digest.update(sysconfig.get_platform().encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(file: Path, *, report: Callable[[str], None]) -> Iterator[None]:
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that makes the same environment")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path, *, requirements: Path, report: Callable[[str], None]) -> None:
    uv = _find_uv()
    if folder.exists():
        shutil.rmtree(folder)
    report(f"making the environment {folder.name}")
    # The interpreter is this process's: what the lock's markers and wheels were chosen for.
    _run_uv([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)], report=report)
    _run_uv(
        [
            *(uv, "pip", "install", "--python", str(folder / "bin" / "python")),
            *("--require-hashes", "--no-deps", "--requirement", str(requirements)),
        ],
        report=report,
    )
    (folder / COMPLETE_MARKER).touch()


def _find_uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise UserError(
            f"uv makes the environments of the images, and it is neither beside {sys.executable} nor on PATH: "
            "install it with `python -m pip install 'posttrain[cli]'`"
        )
    return found


def _run_uv(argv: list[str], *, report: Callable[[str], None]) -> None:
    # Under a shim: an installation does not go on when this process is killed.
    environ = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "UV_PROJECT"}}
    environ |= {"UV_COMPILE_BYTECODE": "1", "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"}
    command = Command(argv=tuple(argv), env=environ, cwd=Path("/"))
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    with open_shim(command, log=None, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            for raw in process.stderr:
                line = raw.decode(errors="replace").strip()
                # One line a package: a hundred of them say no more than their number, which follows.
                if line and not line.startswith("+ "):
                    last_lines.append(line)
                    report(line)
            ended = read_end(process)
        finally:
            process.stdin.close()
    if ended is None or ended.exit_code != 0:
        code = "was killed" if ended is None else f"ended with exit code {ended.exit_code}"
        raise UserError(
            "\n".join(
                [
                    f"`{' '.join(argv)}` {code}:",
                    *(f"    {line}" for line in last_lines),
                    "The usual causes are an unreachable package index (check network and proxy), a full disk and "
                    "a Python without wheels; run the same command again when the cause is gone.",
                ]
            )
        )
