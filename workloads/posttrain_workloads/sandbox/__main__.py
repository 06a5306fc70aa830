"""`python -m posttrain_workloads.sandbox`: try the walls, then serve Piston's API.

Where to listen is an option, or in a pod the environment variable POSTTRAIN_LISTEN.

Exit codes: 2 the walls do not hold or the options do not fit this machine; 1 it could not go on serving.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from posttrain.contract import environment
from posttrain_workloads.sandbox import selftest
from posttrain_workloads.sandbox.forkserver import GuardError
from posttrain_workloads.sandbox.job import Walls
from posttrain_workloads.sandbox.languages import find_runtimes
from posttrain_workloads.sandbox.protocol import Ceiling
from posttrain_workloads.sandbox.server import Sandbox, Settings, serve

_MIB = 1 << 20
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def main() -> None:
    """Run as the command line says."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str], *, walls: Walls = Walls()) -> int:  # noqa: B008 - frozen
    """Run with these arguments; return the exit code. Only a test leaves a wall out."""
    with tempfile.TemporaryDirectory(prefix="posttrain-sandbox-", ignore_cleanup_errors=True) as folder:
        settings = _settings(arguments, work=Path(folder))
        try:
            selftest.check_kernel()
            _check_memory(settings)
            return asyncio.run(_serve(settings, walls=walls))
        except selftest.WallError as error:
            print(f"the sandbox does not start: {error}", file=sys.stderr)
            return 2


async def _serve(settings: Settings, *, walls: Walls) -> int:
    secret = selftest.plant_secret()
    sandbox = Sandbox(settings, find_runtimes(), walls=walls)
    try:
        try:
            await selftest.check_walls(sandbox.run, work=settings.work, secret=secret)
        except GuardError as error:
            raise selftest.WallError(f"the program that tries the walls was not started: {error}") from None
        await serve(sandbox, settings)
        return 0 if sandbox.alive else 1
    finally:
        sandbox.close()


def _settings(arguments: list[str], *, work: Path) -> Settings:
    default = Ceiling()
    parser = argparse.ArgumentParser(prog="python -m posttrain_workloads.sandbox", description="Run foreign programs.")
    host, _, port = os.environ.get(environment.LISTEN, "127.0.0.1:2000").rpartition(":")
    parser.add_argument("--host", default=host, help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=int(port), help="0 for any free one (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=_cpus(), help="jobs at the same time (default: one a CPU)")
    parser.add_argument("--body-mib", type=int, default=64, help="largest request (default: %(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, default=default.max_seconds, help="longest time limit (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-mib",
        type=int,
        default=default.memory_bytes // _MIB,
        help="most memory of a job (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.concurrency < 1:
        parser.error("--concurrency: at least 1")
    return Settings(
        host=options.host,
        port=options.port,
        work=work,
        concurrency=options.concurrency,
        body_bytes=options.body_mib * _MIB,
        ceiling=Ceiling(max_seconds=options.max_seconds, memory_bytes=options.memory_mib * _MIB),
    )


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _check_memory(settings: Settings) -> None:
    """Refuse what the container's memory cannot hold: the kernel would kill, and not only the program at fault."""
    needed = settings.concurrency * settings.ceiling.memory_bytes
    for file in _CGROUP_LIMITS:
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < needed:
            raise selftest.WallError(
                f"{settings.concurrency} jobs of up to {settings.ceiling.memory_bytes // _MIB} MiB do not fit into the "
                f"container's {int(text) // _MIB} MiB: lower --concurrency or --memory-mib, or give it more memory"
            )


if __name__ == "__main__":
    main()
