"""The pods of one run as processes of this machine: what a kubelet and a container runtime do for them.

It owns the pods, their containers, probes and files; it must not decide which pods there ought to be, nor read what a
run writes into its storage.

Everything happens in the thread that calls it. What comes from elsewhere, a container's end or a probe's answer, is put
into a queue, `notify` is called, and the next `take_up_news` acts on it.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from posttrain.local.container import Container, Ended, ProcessId
from posttrain.local.leftovers import end_leftovers
from posttrain.local.network import Network
from posttrain.local.pod_process import Site, Surroundings, build_process, choose_gpus
from posttrain.local.pods import (
    ended_status,
    format_time,
    grace_seconds,
    is_being_deleted,
    is_finished,
    is_restarted,
    lost_status,
    probed_status,
    running_status,
    vanished_status,
)
from posttrain.local.probes import ReadinessProbe
from posttrain.local.services import STEADY, restart_delay
from posttrain.local.state import RunFolder, write_atomically
from posttrain.local.volumes import TERMINATION_FILE, make_volumes
from posttrain.plan.labels import ATTEMPT
from posttrain.plan.types import Manifest, ObjectRef

_PROCESS = "posttrain.dev/process"
"""Annotation of a local pod: the ids by which its processes are found again."""
_CLOSE_SECONDS = 10.0
_MESSAGE_LINES, _MESSAGE_BYTES = 80, 2048
"""What a kubelet takes of the log where a container that failed left no message (FallbackToLogsOnError)."""


class Tokens(Protocol):
    """Who lets a pod report its progress."""

    def issue(self, *, attempt: int) -> str:
        """Return a token with which a pod of that attempt may report."""

    def revoke(self, token: str) -> None:
        """Take the token back: its pod has ended."""


class Objects(Protocol):
    """The objects that pods refer to."""

    def get(self, ref: ObjectRef) -> Manifest | None:
        """Return one of them."""

    def list(self, kind: str) -> list[Manifest]:
        """Return all of a kind."""


@dataclass
class _Pod:
    """A pod, and its container while it runs."""

    manifest: Manifest
    folder: Path
    roots: Mapping[str, Path] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    token: str | None = None
    container: Container | None = None
    probe: ReadinessProbe | None = None
    log_start: int = 0
    """Where in the log the current container begins."""
    ends: int = 0
    """Ends of its container since one of them ran for long."""
    restart_at: datetime | None = None

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])


class Kubelet:
    """The pods of one run."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        site: Site,
        claims: Mapping[str, Path],
        objects: Objects,
        tokens: Tokens,
        notify: Callable[[], None],
        clock: Callable[[], datetime],
    ) -> None:
        self._folder = folder
        self._site = site
        self._claims = claims
        self._objects = objects
        self._tokens = tokens
        self._notify = notify
        self._clock = clock
        self._network = Network(lambda: objects.list("Service"))
        self._news: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._no_grace = False
        loaded = (json.loads(file.read_text()) for file in sorted(folder.objects.glob("Pod-*.json")))
        self._pods = {
            str(manifest["metadata"]["name"]): _Pod(manifest, folder.pods / manifest["metadata"]["uid"])
            for manifest in loaded
        }

    @property
    def pods(self) -> list[Manifest]:
        """Every pod, by name."""
        return [self._pods[name].manifest for name in sorted(self._pods)]

    def get(self, name: str) -> Manifest | None:
        """Return a pod."""
        return self._pods[name].manifest if name in self._pods else None

    @property
    def has_live_pods(self) -> bool:
        """Whether a container runs that ends by itself; what has just ended counts until its end is taken up."""
        return any(pod.container is not None and not is_restarted(pod.manifest) for pod in self._pods.values())

    # --- What the controllers ask for --------------------------------------------------------------------------------

    def start(self, manifest: Manifest) -> None:
        """Make a pod and start its container; not while one of its name is still ending, as no controller can then."""
        if manifest["metadata"]["name"] in self._pods:
            return
        taken = {gpu for other in self._pods.values() if not is_finished(other.manifest) for gpu in other.gpus}
        pod = _Pod(manifest, self._folder.pods / manifest["metadata"]["uid"])
        pod.gpus = choose_gpus(manifest, site=self._site, taken=taken)
        attempt = manifest["metadata"]["labels"].get(ATTEMPT)
        pod.token = self._tokens.issue(attempt=int(attempt)) if attempt is not None else None
        self._pods[pod.name] = pod
        # Before its process: whatever happens now, the next start finds a pod to bury.
        self._write(pod, manifest)
        (pod.folder / "work").mkdir(parents=True)
        pod.roots = make_volumes(
            manifest,
            folder=pod.folder,
            claim=lambda claim: self._claims.get(claim) or self._folder.volumes / claim,
            config_map=self._config_map,
            token=pod.token,
        )
        self._start_container(pod)

    def delete(self, name: str) -> None:
        """Let a pod go: at once, or when its container has ended, which is told to."""
        pod = self._pods[name]
        if pod.container is None:
            self._remove(pod)
            return
        if is_being_deleted(pod.manifest):
            return
        grace = 0 if self._no_grace else grace_seconds(pod.manifest)
        deletion = {
            "deletionTimestamp": format_time(self._clock() + timedelta(seconds=grace)),
            "deletionGracePeriodSeconds": grace,
        }
        self._write(pod, {**pod.manifest, "metadata": {**pod.manifest["metadata"], **deletion}})
        pod.container.terminate(grace_seconds=grace)

    # --- The life of a pod -------------------------------------------------------------------------------------------

    def take_up_news(self) -> None:
        """Act on what has come from elsewhere."""
        while True:
            try:
                act = self._news.get_nowait()
            except Empty:
                return
            act()

    def restart(self) -> datetime | None:
        """Start again what is due, and return when the next container is."""
        waiting = [pod for pod in self._pods.values() if pod.restart_at is not None and not self._no_grace]
        now = self._clock()
        for pod in waiting:
            if pod.restart_at is not None and pod.restart_at <= now:
                (pod.folder / TERMINATION_FILE).write_text("")
                self._start_container(pod)
        return min((pod.restart_at for pod in waiting if pod.restart_at is not None), default=None)

    def _start_container(self, pod: _Pod) -> None:
        manifest = pod.manifest
        given = Surroundings(
            cwd=pod.folder / "work",
            roots=pod.roots,
            network=self._network,
            secrets={**self._site.secrets, **self._own_secrets()},
            gpus=pod.gpus,
        )
        log = self._folder.log_file(pod.name)
        pod.log_start = log.stat().st_size if log.exists() else 0
        pod.restart_at = None
        pod.container = container = Container(
            build_process(manifest, site=self._site, given=given),
            log=log,
            on_end=lambda ended: self._announce(partial(self._end_container, pod, ended)),
        )
        annotations = {
            **manifest["metadata"].get("annotations", {}),
            _PROCESS: json.dumps([[process.pid, process.start_ticks] for process in (container.shim, container.main)]),
        }
        metadata = {**manifest["metadata"], "annotations": annotations}
        status = running_status(manifest, started_at=container.started_at)
        self._write(pod, {**manifest, "metadata": metadata, "status": status})
        probe = manifest["spec"]["containers"][0].get("readinessProbe")
        if probe is not None:
            pod.probe = ReadinessProbe(
                probe,
                port=self._network.port_of(manifest, probe["httpGet"]["port"]),
                on_change=lambda ready: self._announce(partial(self._tell_ready, pod, container, ready)),
            )
        self._notify()

    def _announce(self, act: Callable[[], None]) -> None:
        self._news.put(act)
        self._notify()

    def _tell_ready(self, pod: _Pod, container: Container, ready: bool) -> None:
        if pod.container is container:
            self._write(pod, {**pod.manifest, "status": probed_status(pod.manifest, ready=ready, now=self._clock())})

    def _end_container(self, pod: _Pod, ended: Ended | None) -> None:
        pod.container = None
        if pod.probe is not None:
            pod.probe.stop()
        if ended is None:
            # The main process died with its shim; what was below it did not.
            end_leftovers(pod.folder)
            status = vanished_status(pod.manifest, now=self._clock())
        else:
            status = ended_status(pod.manifest, ended, message=self._last_words(pod, ended))
        if is_being_deleted(pod.manifest):
            self._remove(pod)
            return
        if is_restarted(pod.manifest):
            if ended is not None and ended.finished_at - ended.started_at >= STEADY:
                pod.ends = 0
            pod.restart_at = (ended.finished_at if ended is not None else self._clock()) + restart_delay(pod.ends)
            pod.ends += 1
        else:
            self._revoke_token(pod)
        self._write(pod, {**pod.manifest, "status": status})

    def _last_words(self, pod: _Pod, ended: Ended) -> str:
        """Return the message of a container that has ended: what it left in its file, else the end of its log."""
        message = (pod.folder / TERMINATION_FILE).read_text(errors="replace")
        policy = pod.manifest["spec"]["containers"][0].get("terminationMessagePolicy")
        if message or policy != "FallbackToLogsOnError" or ended.exit_code == 0:
            return message
        with self._folder.log_file(pod.name).open("rb") as log:
            log.seek(pod.log_start)
            lines = log.read()[-_MESSAGE_BYTES:].decode(errors="replace").splitlines(keepends=True)
        return "".join(lines[-_MESSAGE_LINES:])

    def _revoke_token(self, pod: _Pod) -> None:
        if pod.token is not None:
            self._tokens.revoke(pod.token)
            pod.token = None

    def _remove(self, pod: _Pod) -> None:
        self._revoke_token(pod)
        del self._pods[pod.name]
        self._file(pod.manifest).unlink(missing_ok=True)
        shutil.rmtree(pod.folder, ignore_errors=True)

    # --- The end of everything ---------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End every container at once, and every later one without a grace period; none is started again."""
        self._no_grace = True
        for pod in self._pods.values():
            if pod.container is not None:
                pod.container.terminate(grace_seconds=0)

    def close(self) -> None:
        """End every container: nothing goes on when this process goes."""
        containers = [pod.container for pod in self._pods.values() if pod.container is not None]
        deadline = time.monotonic() + _CLOSE_SECONDS
        for container in containers:
            container.terminate(grace_seconds=_CLOSE_SECONDS / 2)
        for container in containers:
            container.wait(timeout_seconds=max(deadline - time.monotonic(), 0))
        self.take_up_news()

    def bury_lost(self, *, owners: Iterable[str]) -> None:
        """End what is left of an earlier `posttrain run` that was killed, and show its pods as lost.

        Those of services are gone: their controllers would replace them. `owners` are the uids of the objects there.
        """
        unfinished = [pod for pod in self._pods.values() if not is_finished(pod.manifest)]
        end_leftovers(self._folder.pods, recorded=[p for pod in unfinished for p in _recorded_processes(pod.manifest)])
        known = set(owners)
        for pod in list(self._pods.values()):
            orphaned = pod.manifest["metadata"]["ownerReferences"][0]["uid"] not in known
            if orphaned or is_being_deleted(pod.manifest) or is_restarted(pod.manifest):
                self._remove(pod)
        for pod in unfinished:
            if pod.name in self._pods:
                self._write(pod, {**pod.manifest, "status": lost_status(pod.manifest, now=self._clock())})

    # --- Objects and files -------------------------------------------------------------------------------------------

    def _config_map(self, name: str) -> Manifest:
        found = self._objects.get(ObjectRef("v1", "ConfigMap", name))
        assert found is not None, f"a plan makes ConfigMap {name} before the pod that mounts it"
        return found

    def _own_secrets(self) -> dict[str, dict[str, str]]:
        """Return the data of the Secrets that the plan made."""
        return {
            secret["metadata"]["name"]: {
                **{key: base64.b64decode(text).decode() for key, text in secret.get("data", {}).items()},
                **secret.get("stringData", {}),
            }
            for secret in self._objects.list("Secret")
        }

    def _file(self, manifest: Manifest) -> Path:
        return self._folder.object_file("Pod", manifest["metadata"]["name"])

    def _write(self, pod: _Pod, manifest: Manifest) -> None:
        pod.manifest = manifest
        write_atomically(self._file(manifest), json.dumps(manifest, indent=2) + "\n")


def _recorded_processes(pod: Manifest) -> Iterable[ProcessId]:
    recorded: list[Any] = json.loads(pod["metadata"].get("annotations", {}).get(_PROCESS, "[]"))
    return [ProcessId(pid=pid, start_ticks=ticks) for pid, ticks in recorded]
