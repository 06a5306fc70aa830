"""The sandbox's HTTP server: Piston's `POST /api/v2/execute` and `GET /api/v2/runtimes`.

It owns how many jobs run at the same time; a job that waits for its turn uses up none of its time.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from aiohttp import web

from posttrain_workloads.sandbox import scratch
from posttrain_workloads.sandbox.forkserver import ForkServer, GuardError
from posttrain_workloads.sandbox.job import Job, StageResult, Walls
from posttrain_workloads.sandbox.languages import Runtime
from posttrain_workloads.sandbox.protocol import Ceiling, RequestError, build_job, build_response, parse_request

RUNTIMES_PATH = "/api/v2/runtimes"
EXECUTE_PATH = "/api/v2/execute"


@dataclass(frozen=True)
class Settings:
    """How a sandbox serves."""

    host: str
    port: int
    """0: any free one."""
    work: Path
    """An existing folder of its own, for the jobs' scratch folders."""
    concurrency: int
    body_bytes: int
    ceiling: Ceiling


class Sandbox:
    """Carries requests out, `concurrency` of them at the same time."""

    def __init__(self, settings: Settings, runtimes: tuple[Runtime, ...], *, walls: Walls) -> None:
        self._settings = settings
        self._runtimes = runtimes
        self._walls = walls
        self._fork_server = ForkServer()
        self._turn = asyncio.Semaphore(settings.concurrency)

    @property
    def alive(self) -> bool:
        """Whether it can carry out anything."""
        return self._fork_server.alive

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        """The languages that are there."""
        return self._runtimes

    async def execute(self, body: bytes) -> dict[str, object]:
        """Carry out the request in a body, and return the answer's.

        Raises:
            RequestError: it is not carried out.
            GuardError: it could not be.
        """
        folder = self._settings.work / secrets.token_hex(16)
        job, runtime = build_job(
            parse_request(body), runtimes=self._runtimes, ceiling=self._settings.ceiling, scratch=str(folder)
        )
        async with self._turn:
            results = await self.run(job)
        return build_response(results, runtime)

    async def run(self, job: Job) -> list[StageResult]:
        """Have a job done.

        Raises:
            GuardError: it could not be; the fault is the sandbox's.
        """
        try:
            results = await self._fork_server.run(replace(job, walls=self._walls))
        except GuardError:
            await asyncio.to_thread(scratch.remove, job.scratch)
            raise
        if results[-1].status == "XX":
            raise GuardError(str(results[-1].message))
        return results

    def close(self) -> None:
        """End what runs."""
        self._fork_server.close()


def build_application(sandbox: Sandbox, *, body_bytes: int) -> web.Application:
    """Return the web application in front of a sandbox."""

    async def execute(request: web.Request) -> web.Response:
        return web.json_response(await sandbox.execute(await request.read()))

    async def runtimes(_: web.Request) -> web.Response:
        if not sandbox.alive:
            raise GuardError("the fork server has ended")
        return web.json_response(
            [
                {"language": runtime.language, "version": runtime.version, "aliases": list(runtime.aliases)}
                for runtime in sandbox.runtimes
            ]
        )

    application = web.Application(middlewares=[_errors_as_json], client_max_size=body_bytes)
    application.router.add_post(EXECUTE_PATH, execute)
    application.router.add_get(RUNTIMES_PATH, runtimes)
    return application


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return web.json_response({"message": str(error)}, status=400)
    except GuardError as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        return web.json_response({"message": f"the sandbox failed: {error}"}, status=500)
    except web.HTTPException as error:
        return web.json_response({"message": error.text or error.reason}, status=error.status)


async def serve(sandbox: Sandbox, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, or until nothing could be carried out any more; says first where it listens."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # A client that goes away has its programs ended, not only its answer dropped.
    runner = web.AppRunner(
        build_application(sandbox, body_bytes=settings.body_bytes), access_log=None, handler_cancellation=True
    )
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, shutdown_timeout=1.0)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"listening on http://{host}:{port}", flush=True)
    try:
        while sandbox.alive and not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), timeout=1.0)
            except TimeoutError:
                continue
    finally:
        await runner.cleanup()
