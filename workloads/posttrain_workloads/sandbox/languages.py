"""The languages: which interpreters and compilers are on this machine, and how they are called.

It owns every command line and what each of them reads; a language whose program is missing is not there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"),
    *("/etc/localtime", "/etc/ssl/openssl.cnf"),
)
"""What any program needs to start. Of /etc as little as possible, of /proc and /home nothing."""
_VERSION = re.compile(r"\d+\.\d+(\.\d+)*")
PATH = "/usr/local/bin:/usr/bin:/bin"
_MIB = 1 << 20

Arguments = Callable[[list[str], int], list[str]]
"""From the names of the files and the memory limit in bytes to what follows the program on its command line."""


@dataclass(frozen=True)
class _Language:
    name: str
    aliases: tuple[str, ...]
    program: str
    run: Arguments
    compile: Arguments | None = None
    extension: str = ""
    runs_output: bool = False
    """Whether what the compiler wrote is run, and not an interpreter."""
    readable: tuple[str, ...] = ()
    version_argument: str = "--version"


@dataclass(frozen=True)
class Runtime:
    """A language that is there."""

    language: str
    aliases: tuple[str, ...]
    version: str
    program: str
    """Absolute path of its interpreter, or of its compiler."""
    readable: tuple[str, ...]
    definition: _Language

    @property
    def compiles(self) -> bool:
        """Whether there is a stage before the run."""
        return self.definition.compile is not None

    def compile_command(self, files: list[str], *, memory_bytes: int) -> tuple[str, ...]:
        """Return the command that compiles the files."""
        assert self.definition.compile is not None
        return (self.program, *self.definition.compile(files, memory_bytes))

    def run_command(self, files: list[str], *, box: str, memory_bytes: int) -> tuple[str, ...]:
        """Return the command that runs the first file, or what became of it."""
        arguments = self.definition.run(files, memory_bytes)
        return (f"{box}/{_OUTPUT}", *arguments) if self.definition.runs_output else (self.program, *arguments)

    def file_name(self, index: int) -> str:
        """Return the name of a file that was sent without one."""
        return f"{'main' if index == 0 else f'file{index}'}{self.definition.extension}"


_OUTPUT = "a.out"


def _main(files: list[str], _: int) -> list[str]:
    return files[:1]


def _gcc(standard: str, extensions: tuple[str, ...]) -> Arguments:
    def arguments(files: list[str], _: int) -> list[str]:
        # With one file whatever its name; with more of them, headers are not compiled.
        sources = [file for file in files if file.endswith(extensions)] or files[:1]
        return ["-O2", "-pipe", f"-std={standard}", "-I.", "-o", _OUTPUT, *sources, "-lm"]

    return arguments


def _java(files: list[str], memory_bytes: int) -> list[str]:
    # Few threads, and a heap that leaves room for the rest. The file is compiled in memory.
    heap = max(memory_bytes // _MIB * 6 // 10, 16)
    return ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", f"-Xmx{heap}m", files[0]]


def _node(files: list[str], memory_bytes: int) -> list[str]:
    return [f"--max-old-space-size={max(memory_bytes // _MIB * 6 // 10, 16)}", files[0]]


_LANGUAGES = (
    _Language("python", ("python3", "py"), "python3", _main, extension=".py"),
    _Language(
        *("c++", ("cpp", "g++", "cpp17"), "g++"),
        run=lambda *_: [],
        compile=_gcc("gnu++17", (".cpp", ".cc", ".cxx", ".c")),
        extension=".cpp",
        runs_output=True,
    ),
    _Language("bash", ("sh",), "bash", _main, extension=".sh"),
    _Language("javascript", ("js", "node", "node-js", "node-javascript"), "node", _node, extension=".js"),
    _Language("java", (), "java", _java, extension=".java", readable=("/etc/java-*", "/etc/ssl/certs/java")),
    _Language(
        *("rscript", ("r",), "Rscript"),
        run=lambda files, _: ["--vanilla", files[0]],
        extension=".R",
        readable=("/etc/R",),
    ),
)


def find_runtimes() -> tuple[Runtime, ...]:
    """Return the languages of this machine, each with the version of its program."""
    return tuple(runtime for language in _LANGUAGES if (runtime := _find(language)))


def select_runtime(runtimes: tuple[Runtime, ...], language: str, version: str) -> Runtime:
    """Return the runtime for a language or one of its aliases in a version, in Piston's notation: `*`, `3.x`, `3.11.2`.

    Raises:
        ValueError: there is none; says what there is.
    """
    for runtime in runtimes:
        if language.lower() in (runtime.language, *runtime.aliases) and _fits(runtime.version, version):
            return runtime
    known = ", ".join(f"{runtime.language}-{runtime.version}" for runtime in runtimes)
    raise ValueError(f"{language}-{version} runtime is unknown: there are {known}")


def python_program() -> str:
    """Return the Python that programs run with: the one our own environment was made from, without its packages."""
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return str(base) if base.is_file() else sys.executable


def python_readable() -> tuple[str, ...]:
    """Return what a Python program may read."""
    return (*_SYSTEM, sys.base_prefix)


def _find(language: _Language) -> Runtime | None:
    program = python_program() if language.name == "python" else shutil.which(language.program, path=PATH)
    if program is None:
        return None
    done = subprocess.run([program, language.version_argument], check=False, capture_output=True, text=True)
    version = _VERSION.search(done.stdout + done.stderr)
    if done.returncode != 0 or version is None:
        return None
    globbed = [str(path) for pattern in language.readable for path in Path("/").glob(pattern.lstrip("/"))]
    return Runtime(
        *(language.name, language.aliases, version[0], program),
        readable=python_readable() if language.name == "python" else (*_SYSTEM, *globbed),
        definition=language,
    )


def _fits(version: str, wanted: str) -> bool:
    """Return whether a version is one of those wanted: each part that is given is the same, `x` and `*` are any."""
    parts = version.split(".")
    for index, part in enumerate(wanted.lstrip("^~=v").split(".")):
        if part in {"x", "X", "*"}:
            return True
        if index >= len(parts) or parts[index] != part:
            return False
    return True
