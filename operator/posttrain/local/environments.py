"""One Python environment an image, made by uv from the lock beside its Dockerfile and kept under its content hash.

It owns where environments lie, which variant of a lock this machine takes, and when an environment is made; it must not
import anything that lives in one.
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
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.local.container import Command, open_shim, read_end
from posttrain.local.downloads import measure_downloads
from posttrain.local.machine import has_nvidia_driver

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


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What an image's environment is made of."""

    name: str
    """The image's, with `-cpu` after it for the variant for machines without an NVIDIA driver."""
    requirements: Path
    resolution: Path
    """The uv.lock that the requirements were exported from."""
    metadata: Path | None
    """A project that is installed too: a distribution without code, which a build for CPUs is found by."""

    @property
    def key(self) -> str:
        """Return a hash of all that it is made of, and of the interpreter."""
        digest = hashlib.sha256(self.requirements.read_bytes())
        if self.metadata is not None:
            digest.update((self.metadata / "pyproject.toml").read_bytes())
        digest.update(f"\n{platform.python_implementation()} {platform.python_version()} ".encode())
        digest.update(sysconfig.get_platform().encode())
        return digest.hexdigest()[:16]

    def folder(self, cache: Path) -> Path:
        """Return where the environment lies, made or not; another content of the lock lies elsewhere."""
        return cache / "envs" / f"{self.name}-{self.key}"


def ensure_environment(
    name: str,
    *,
    cache: Path,
    report: Callable[[str], None],
    announce: Callable[[str], None] | None = None,
    images: Path | None = None,
    nvidia: bool | None = None,
) -> Path:
    """Return the interpreter of an image's environment, which is made first if need be; `report` gets lines on the way.

    `announce` gets in place of `report` what a person should still see while it is made: what there is to download.
    `images` is the folder that holds a folder an image; `nvidia` chooses the variant for machines with NVIDIA's driver
    or the one for those without, in place of what this machine has. Two processes may ask at once: one makes it, the
    other waits.

    Raises:
        UserError: there is no such image, no uv, or uv could not install what the lock names.
    """
    has_driver = has_nvidia_driver() if nvidia is None else nvidia
    lock = find_lock(name, images=images or images_root(), nvidia=has_driver)
    folder = lock.folder(cache)
    interpreter = folder / "bin" / "python"
    if (folder / COMPLETE_MARKER).exists():
        return interpreter
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), report=report):
        if not (folder / COMPLETE_MARKER).exists():
            _make(folder, lock=lock, report=report, announce=announce or report)
    return interpreter


def find_lock(name: str, *, images: Path, nvidia: bool) -> Lock:
    """Return what an image's environment is made of; `nvidia` is whether this machine has NVIDIA's driver.

    Raises:
        UserError: there is no such image.
    """
    requirements = images / name / "requirements.txt"
    if not requirements.is_file():
        known = ", ".join(sorted(folder.parent.name for folder in images.glob("*/requirements.txt"))) or "none"
        raise UserError(f"there is no image {name!r} with a requirements.txt in {images}: take one of these: {known}")
    own = images / name / "uv.lock"
    resolution = own if own.is_file() else images.parent / "uv.lock"
    for_cpus = images / name / "requirements-cpu.txt"
    if nvidia or not for_cpus.is_file():
        return Lock(name=name, requirements=requirements, resolution=resolution, metadata=None)
    return Lock(name=f"{name}-cpu", requirements=for_cpus, resolution=resolution, metadata=images / name / "cpu")


@contextmanager
def _locked(file: Path, *, report: Callable[[str], None]) -> Iterator[None]:
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that makes the same environment")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path, *, lock: Lock, report: Callable[[str], None], announce: Callable[[str], None]) -> None:
    uv = _find_uv()
    if folder.exists():
        shutil.rmtree(folder)
    report(f"making the environment {folder.name}")
    found = measure_downloads(lock.requirements.read_text(), resolution=lock.resolution.read_text())
    announce(f"The environment of the image {lock.name} is made, which is done once: {found}")
    if lock.metadata is not None:
        report("it is the variant for machines where nvidia-smi finds no GPU")
    # The interpreter is this process's: what the lock's markers and wheels were chosen for.
    _run_uv([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)], report=report)
    install = (uv, "pip", "install", "--python", str(folder / "bin" / "python"), "--no-deps")
    _run_uv([*install, "--require-hashes", "--requirement", str(lock.requirements)], report=report)
    if lock.metadata is not None:
        _run_uv([*install, str(lock.metadata)], report=report)
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
