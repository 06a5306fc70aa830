"""One program on a machine that a service lends, as that machine's own Python does it: an answer in Piston's form.

It owns how a program is compiled, run and limited there. It is sent as text: it must not import anything beyond the
standard library of Python 3.10, nor do anything when it is imported.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

# What must be there, how a program is compiled (None: not at all), and how it is run.
_LANGUAGES: dict[str, tuple[str, list[str] | None, list[str]]] = {
    "python": ("python3", None, ["python3", "{first}"]),
    "c++": ("g++", ["g++", "-O2", "-pipe", "-std=gnu++17", "-I.", "-o", "a.out", "{sources}", "-lm"], ["./a.out"]),
    "bash": ("bash", None, ["bash", "{first}"]),
}
_ALIASES = {"python3": "python", "py": "python", "cpp": "c++", "g++": "c++", "cpp17": "c++", "sh": "bash"}
_SOURCES = (".cpp", ".cc", ".cxx", ".c")
_OUTPUT_BYTES = 16 << 20
_FILE_BYTES = 64 << 20
_COMPILER_BYTES = 2 << 30
_NOBODY = 65534
_LIMITED = 'ulimit -v "$1" && ulimit -t "$2" && ulimit -f "$3" && ulimit -c 0 && shift 3 && exec "$@"'


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return what came of a request: Piston's answer, or `message` where the program could not be run."""
    language = _ALIASES.get(request["language"], request["language"])
    if language not in languages():
        return {"message": f"there is no language {request['language']} on the machine"}
    _, compiler, command = _LANGUAGES[language]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o777)
        names = [file for file, _ in request["files"]]
        for file, content in request["files"]:
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        stages = {}
        if compiler is not None:
            sources = [file for file in names if file.endswith(_SOURCES)] or names[:1]
            whole = [part for word in compiler for part in (sources if word == "{sources}" else [word])]
            seconds = request["compile_seconds"]
            stages["compile"] = _run(
                whole, "", folder, seconds=seconds, cpu_seconds=seconds, memory_bytes=_COMPILER_BYTES
            )
            if stages["compile"]["code"] != 0:
                return stages
        stages["run"] = _run(
            [names[0] if word == "{first}" else word for word in command] + request["args"],
            request["stdin"],
            folder,
            seconds=request["run_seconds"],
            cpu_seconds=request["cpu_seconds"],
            memory_bytes=request["memory_bytes"],
        )
        return stages


def languages() -> list[str]:
    """Return the languages that are there."""
    return [name for name, (program, _, _) in _LANGUAGES.items() if shutil.which(program) is not None]


def say(value: Any) -> None:
    """Print a value so that it can be found among whatever else is printed."""
    print("\n<<" + base64.b64encode(json.dumps(value).encode()).decode() + ">>")


def _run(
    command: list[str], stdin: str, folder: Path, *, seconds: float, cpu_seconds: float, memory_bytes: int
) -> dict[str, Any]:
    limits = [str(memory_bytes >> 10), str(int(cpu_seconds) + 1), str(_FILE_BYTES // 512)]
    nobody: dict[str, Any] = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    process = subprocess.Popen(
        ["sh", "-c", _LIMITED, "sh", *limits, *command],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **nobody,
    )
    assert process.stdin is not None
    writer = threading.Thread(target=_write, args=(process.stdin, stdin.encode()), daemon=True)
    readers = [_Reader(pipe, process) for pipe in (process.stdout, process.stderr)]
    for thread in (writer, *readers):
        thread.start()
    late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    _kill(process)
    code = process.wait()
    for reader in readers:
        reader.join(5)
    stopped = late or any(reader.full for reader in readers)
    return {
        "stdout": b"".join(readers[0].blocks).decode("utf-8", "replace"),
        "stderr": b"".join(readers[1].blocks).decode("utf-8", "replace"),
        "code": None if stopped or code < 0 else code,
        "signal": "SIGKILL" if stopped else signal.Signals(-code).name if code < 0 else None,
    }


class _Reader(threading.Thread):
    """Keeps what a process writes, and ends the process where that is too much."""

    def __init__(self, pipe: Any, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.blocks: list[bytes] = []
        self.full = False
        self._pipe = pipe
        self._process = process

    def run(self) -> None:
        """Read to the end."""
        size = 0
        for block in iter(lambda: self._pipe.read1(65536), b""):
            size += len(block)
            if size > _OUTPUT_BYTES:
                self.full = True
                _kill(self._process)
                return
            self.blocks.append(block)


def _write(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a program need not read it
        pipe.write(data)
        pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
