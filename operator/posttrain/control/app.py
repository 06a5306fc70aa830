"""The operator's process: `python -m posttrain.control`.

It owns kopf, the process' options, its signals and its end; it must not know what is done about a run. kopf is used at
the edge only: it watches the TrainingRuns and says when the process lives. It runs in a thread of its own, since it
takes every task of its event loop for its own when it ends (kopf 1.45, running.py, `run_tasks`), and is started again
when it does: queue, cache and lease live on. A lost lease does not end the process; see `leadership`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kopf
import structlog
import uvloop

from posttrain.api.base import GROUP, VERSION
from posttrain.api.training_run import PLURAL
from posttrain.control.authentication import Authenticator
from posttrain.control.authority import Authority
from posttrain.control.cache import Cache
from posttrain.control.certificates import CertificateFiles, ServingCertificate
from posttrain.control.cluster import Connection, connect
from posttrain.control.fence import FencedCluster
from posttrain.control.health import parse_address, serve_health
from posttrain.control.kinds import TRAINING_RUN
from posttrain.control.leadership import Leadership
from posttrain.control.lease import Election, LeaseTimes
from posttrain.control.logs import configure_logs
from posttrain.control.operator import Operator
from posttrain.control.port import Unavailable
from posttrain.control.progress import ProgressWriter
from posttrain.control.server import ProgressServer
from posttrain.errors import UserError
from posttrain.settings import Settings, load_settings

_CERTIFICATE_FOLDER = Path("/etc/posttrain-operator/tls")
_IDENTITY = "posttrain"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_KOPF_PAGE = 40
_KOPF_IDLE_SECONDS = 0.1
_RESTART_SECONDS = 1.0
_RESTART_MAX_SECONDS = 30.0
_GARBAGE_THRESHOLDS = 10_000, 5, 5
"""Between two looks for cycles. Each look at a run makes thousands of objects, and hardly a cycle."""
_END_SECONDS = 2.0
"""How long the end of kopf is waited for: a term's work must have ended before another may lead."""

log = structlog.get_logger(__name__)


# --- kopf ------------------------------------------------------------------------------------------------------------


class _NoDiffBase(kopf.DiffBaseStorage):
    """What kopf compares objects with in order to call handlers of changes, of which there are none.

    Its own would copy every object several times at each event: half of all that kopf does here.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class KopfEdge:
    """kopf's watch of the TrainingRuns, supervised."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started = threading.Event()
        self._ended: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why kopf does not watch; None while it does."""
        if self._started.is_set():
            return None
        return "kopf has not started yet" if self._ended is None else f"kopf ended: {self._ended}"

    async def run(self, cache: Cache) -> None:
        """Put every run that kopf reports into the cache, until cancelled."""
        loop = asyncio.get_running_loop()
        delay = _RESTART_SECONDS
        while True:
            stop, ended, started = threading.Event(), asyncio.Event(), loop.time()

            def watch(stop: threading.Event = stop, ended: asyncio.Event = ended) -> None:
                try:
                    uvloop.run(self._watch(cache, loop=loop, stop=stop))
                except Exception as error:  # whatever ended it: it is started again
                    self._ended = str(error) or type(error).__name__
                    log.warning("kopf ended", error=self._ended)
                finally:
                    self._started.clear()
                    with contextlib.suppress(RuntimeError):  # it took too long: the loop is closed already
                        loop.call_soon_threadsafe(ended.set)

            thread = threading.Thread(target=watch, name="kopf", daemon=True)
            thread.start()
            try:
                await ended.wait()
            finally:
                stop.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), _END_SECONDS)
                    thread.join(_END_SECONDS)
            delay = _RESTART_SECONDS if loop.time() - started > 60 else min(delay * 2, _RESTART_MAX_SECONDS)
            log.warning("kopf is started again", seconds=delay)
            await asyncio.sleep(delay)

    async def _watch(self, cache: Cache, *, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)  # type: ignore[misc, unused-ignore]
        def log_in(**_: Any) -> kopf.ConnectionInfo:
            return kopf.ConnectionInfo(**self._connection.to_kopf())

        @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)  # type: ignore[misc, unused-ignore]
        async def take(event: Any, **_: Any) -> None:
            # kopf gives an event's object without its type where it listed it.
            manifest = {"apiVersion": TRAINING_RUN[0], "kind": TRAINING_RUN[1], **event["object"]}
            if not stop.is_set():  # of a term that is over nothing is reported: its threads end late
                loop.call_soon_threadsafe(cache.drop if event["type"] == "DELETED" else cache.put, manifest)

        settings = kopf.OperatorSettings()
        # Each of these would need rights of its own: events are ours, CRDs and namespaces nobody's business.
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.networking.error_backoffs = (1, 2, 4, 8)
        settings.persistence.diffbase_storage = _NoDiffBase()
        # Else it has all runs in memory at once whenever it lists them: on one page, and in the tasks that took one
        # each, which keep it until they end.
        settings.watching.chunk_size = _KOPF_PAGE
        settings.queueing.idle_timeout = _KOPF_IDLE_SECONDS
        # Between two watches, also where each is answered with 410: a tenth of a second would be a hot loop.
        settings.watching.reconnect_backoff = 1.0
        # It would kill the process, which is more than kopf here.
        settings.process.ultimate_exiting_timeout = None
        await kopf.operator(
            registry=registry,
            settings=settings,
            standalone=True,
            clusterwide=True,
            stop_flag=stop,
            ready_flag=self._started,
            # Else it looks up the name of this process' user, and an image's user by number has none.
            identity=_IDENTITY,  # type: ignore[arg-type]  # its own type is not public
        )


# --- The process -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the operator until it is told to stop; return the exit code."""
    options = _parse_options(argv)
    configure_logs(level=options.log_level)
    # What has been loaded lives as long as the process: the collector need not go through it again and again.
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    try:
        settings = load_settings(options.settings) if options.settings else Settings()
        return uvloop.run(_serve(options, settings))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (Unavailable, OSError) as error:
        print(error, file=sys.stderr)
        return 1


async def _serve(options: argparse.Namespace, settings: Settings) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    certificate = ServingCertificate(
        CertificateFiles(certificate=options.tls_certificate, key=options.tls_key, authority=options.tls_authority)
    )
    cluster = await connect(kubeconfig=options.kubeconfig)
    election = Election(
        cluster,
        namespace=options.namespace or _own_namespace(),
        name=settings.operator.lease_name,
        identity=options.identity or f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}",
        times=LeaseTimes(),
        monotonic=asyncio.get_running_loop().time,
    )
    fenced = FencedCluster(cluster, holds=election.holds)

    def build_operator() -> Operator:
        return Operator(
            fenced,
            settings=settings,
            edge=KopfEdge(cluster.connection),
            authority=Authority(fenced, settings.progress_server, read_authority=certificate.authority_text),
        )

    leadership = Leadership(election, build_operator=build_operator)
    server = ProgressServer(
        authenticator=Authenticator(cluster), writer=ProgressWriter(cluster), certificate=certificate
    )
    try:
        host, port = parse_address(options.serve_address)
        await server.start(host=host, port=port)
        async with serve_health(options.health_address, leadership=leadership):
            leading = asyncio.create_task(leadership.run(), name="leading")
            stopped = asyncio.create_task(stopping.wait(), name="stopping")
            await asyncio.wait((leading, stopped), return_when=asyncio.FIRST_COMPLETED)
            code = 0
            if leading.done():
                log.error("the operator ends by an error", exc_info=leading.exception())
                code = 1
            leading.cancel()
            await asyncio.wait((leading,))
            if election.holds():
                await election.release()
            return code
    finally:
        await server.close()
        await cluster.close()


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "posttrain-system"


def _parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m posttrain.control", description="The operator of posttrain.")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="settings as YAML: images, profiles, prices")
    kubeconfig = os.environ.get("KUBECONFIG")
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        default=Path(kubeconfig) if kubeconfig else None,
        help="the cluster; default: $KUBECONFIG, else the one that this pod runs in",
    )
    parser.add_argument("--namespace", metavar="NAME", help="where the lease lies; default: this pod's namespace")
    parser.add_argument("--identity", metavar="NAME", help="name in the lease; default: host name and a random part")
    parser.add_argument("--health-address", metavar="HOST:PORT", default="127.0.0.1:8080")
    parser.add_argument("--serve-address", metavar="HOST:PORT", default="127.0.0.1:8443", help="of the progress server")
    folder = CertificateFiles.in_folder(_CERTIFICATE_FOLDER)
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", default=folder.certificate)
    parser.add_argument("--tls-key", type=Path, metavar="FILE", default=folder.key)
    parser.add_argument("--tls-authority", type=Path, metavar="FILE", default=folder.authority)
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser.parse_args(argv)
