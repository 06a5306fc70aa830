"""Piston's wire protocol: what a request may hold, and how results are written.

It owns validation against the sandbox's limits; every refusal is a `RequestError` that says what to change.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain_workloads.sandbox.job import Job, Limits, Stage, StageResult
from posttrain_workloads.sandbox.languages import PATH, Runtime, select_runtime
from posttrain_workloads.sandbox.walls import box, temporary

MIN_MEMORY_BYTES = 16 << 20
_MAX_FILES = 256
_MAX_ARGUMENTS = 256
_MIB = 1 << 20


class RequestError(Exception):
    """A request that is not carried out: status 400."""


@dataclass(frozen=True)
class Ceiling:
    """The most that a request may ask for, and what it gets where it asks for nothing."""

    max_seconds: float = 60.0
    run_seconds: float = 3.0
    compile_seconds: float = 10.0
    memory_bytes: int = 1024 * _MIB
    output_bytes: int = 16 * _MIB
    file_bytes: int = 64 * _MIB
    scratch_bytes: int = 256 * _MIB
    processes: int = 64


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _File(_Model):
    name: str | None = None
    content: str
    encoding: Literal["utf8", "base64", "hex"] = "utf8"


class ExecuteRequest(_Model):
    """The body of `POST /api/v2/execute`. Times are in milliseconds, memory in bytes; -1 is the most there is."""

    language: str = Field(min_length=1, max_length=64)
    version: str = Field(min_length=1, max_length=64)
    files: list[_File] = Field(min_length=1, max_length=_MAX_FILES)
    stdin: str = ""
    args: list[str] = Field(default=[], max_length=_MAX_ARGUMENTS)
    compile_timeout: float | None = None
    run_timeout: float | None = None
    compile_cpu_time: float | None = None
    run_cpu_time: float | None = None
    compile_memory_limit: int | None = None
    run_memory_limit: int | None = None


def parse_request(body: bytes) -> ExecuteRequest:
    """Return the request in a body.

    Raises:
        RequestError: it is not JSON, or not of this shape.
    """
    try:
        return ExecuteRequest.model_validate_json(body)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors())
        raise RequestError("; ".join(problems)) from None


def build_job(
    request: ExecuteRequest, *, runtimes: tuple[Runtime, ...], ceiling: Ceiling, scratch: str
) -> tuple[Job, Runtime]:
    """Return what a guard is to do for a request, and the runtime that does it.

    Raises:
        RequestError: no such language here, a file that would lie elsewhere, or more than the ceiling.
    """
    try:
        runtime = select_runtime(runtimes, request.language, request.version)
    except ValueError as error:
        raise RequestError(str(error)) from None
    files = [(file.name or runtime.file_name(index), file) for index, file in enumerate(request.files)]
    names = [_checked_name(name) for name, _ in files]
    contents = tuple((name, _decode(file)) for name, (_, file) in zip(names, files, strict=True))
    code_names = [name for name, (_, file) in zip(names, files, strict=True) if file.encoding == "utf8"] or names
    run_limits = _limits(
        *("run", ceiling, ceiling.run_seconds),
        wall=request.run_timeout,
        cpu=request.run_cpu_time,
        memory=request.run_memory_limit,
    )
    stages = []
    if runtime.compiles:
        limits = _limits(
            *("compile", ceiling, ceiling.compile_seconds),
            wall=request.compile_timeout,
            cpu=request.compile_cpu_time,
            memory=request.compile_memory_limit,
        )
        command = runtime.compile_command(code_names, memory_bytes=limits.memory_bytes)
        stages.append(Stage(command, limits, change_mode=True))
    command = runtime.run_command(code_names, box=box(scratch), memory_bytes=run_limits.memory_bytes)
    if any("\0" in argument for argument in request.args):
        raise RequestError("args: no argument can hold a NUL character")
    stages.append(
        Stage(
            (*command, *request.args),
            run_limits,
            stdin=request.stdin.encode(errors="surrogatepass"),
            # What recurses deeply, recurses on the machine's stack.
            stack_bytes=run_limits.memory_bytes if runtime.compiles else 16 * _MIB,
        )
    )
    environment = {"PATH": PATH, "HOME": box(scratch), "TMPDIR": temporary(scratch), "LANG": "C.UTF-8"}
    return Job(scratch, contents, tuple(stages), runtime.readable, environment), runtime


def build_response(results: Sequence[StageResult], runtime: Runtime) -> dict[str, object]:
    """Return the body of the answer: `compile` where there is such a stage, `run` where it was reached."""
    names = ("compile", "run") if runtime.compiles else ("run",)
    stages = {name: _stage_body(result) for name, result in zip(names, results, strict=False)}
    return {"language": runtime.language, "version": runtime.version, **stages}


def _stage_body(result: StageResult) -> dict[str, object]:
    return {
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "output": result.output.decode(errors="replace"),
        "code": result.code,
        "signal": result.signal,
        "message": result.message,
        "status": result.status,
        "memory": result.memory_bytes,
        "cpu_time": round(result.cpu_seconds * 1000),
        "wall_time": round(result.wall_seconds * 1000),
    }


def _limits(
    stage: str,
    ceiling: Ceiling,
    default_seconds: float,
    *,
    wall: float | None,
    cpu: float | None,
    memory: float | None,
) -> Limits:
    wall = _within(wall, ceiling.max_seconds * 1000, f"{stage}_timeout")
    wall_seconds = default_seconds if wall is None else wall / 1000
    cpu = _within(cpu, ceiling.max_seconds * 1000, f"{stage}_cpu_time")
    memory = _within(memory, ceiling.memory_bytes, f"{stage}_memory_limit")
    if memory is not None and memory < MIN_MEMORY_BYTES:
        raise RequestError(f"{stage}_memory_limit: no program starts with less than {MIN_MEMORY_BYTES} bytes")
    return Limits(
        wall_seconds=wall_seconds,
        cpu_seconds=wall_seconds if cpu is None else cpu / 1000,
        memory_bytes=int(memory or ceiling.memory_bytes),
        output_bytes=ceiling.output_bytes,
        file_bytes=ceiling.file_bytes,
        scratch_bytes=ceiling.scratch_bytes,
        processes=ceiling.processes,
    )


def _within(value: float | None, most: float, name: str) -> float | None:
    if value is None:
        return None
    if value == -1:
        return most
    if not 0 < value <= most:
        raise RequestError(f"{name}: {value:g} is not between 0 and {most:g}, the most that this sandbox gives")
    return value


def _checked_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or name.startswith("-"):
        raise RequestError(f"files: {name!r} is no name inside the program's folder")
    return str(path)


def _decode(file: _File) -> bytes:
    decoders: dict[str, Callable[[str], bytes]] = {
        "utf8": lambda text: text.encode(errors="surrogatepass"),
        "base64": lambda text: base64.b64decode(text, validate=True),
        "hex": bytes.fromhex,
    }
    try:
        return decoders[file.encoding](file.content)
    except (ValueError, binascii.Error):
        raise RequestError(f"files: the content of {file.name!r} is not {file.encoding}") from None
