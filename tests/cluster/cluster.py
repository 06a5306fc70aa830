"""A Kubernetes cluster for tests, in one folder and gone with the process that started it.

It owns what is started, in which order, and what a test may ask of it; it must not build anything.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.cluster.addresses import LOOPBACK, Ports
from tests.cluster.components import why_not
from tests.cluster.control_plane import NODE_NAME, ControlPlane
from tests.cluster.errors import ClusterError
from tests.cluster.host_webhooks import apply_objects
from tests.cluster.images import BUSYBOX
from tests.cluster.kueue import install_kueue
from tests.cluster.kwok import PLAYED, build_fake_node, build_kwok, next_names
from tests.cluster.machine import Machine
from tests.cluster.node import Node
from tests.cluster.processes import Process, end_leftovers, poll, tail
from tests.cluster.training_operator import TUNED, TrainingOperatorOptions, install_training_operator

NODE_SECONDS = 60.0
_LOCK = "test-cluster.lock"


class TestCluster:
    """A control plane with the training operator and KWOK for fake nodes; a real node and Kueue where asked for.

    Use it as a context: at its end, or when this process dies, its processes end.
    """

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exit = ExitStack()
        self._processes: list[Process] = []
        self._node: Node | None = None

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        training_operator: TrainingOperatorOptions = TUNED,
        node: bool = False,
        kueue: bool = False,
        kueue_config: Mapping[str, Any] | None = None,
        container_mounts: Mapping[Path, str] | None = None,
    ) -> TestCluster:
        """Start a cluster in a folder; what an earlier one left there is ended and removed first.

        `kueue_config` is put over the top level of Kueue's configuration. `container_mounts` are folders of this host
        that every container of the real node sees, to be read, at the given paths.

        Raises:
            ClusterError: a part is not built, the folder is in use, or a component did not start; the message has the
                end of its log.
        """
        for part in ("control-plane", *(["node"] if node else []), *(["kueue"] if kueue else [])):
            if reason := why_not(part):
                raise ClusterError(f"{part}: {reason}")
        cluster = cls(folder.absolute())
        try:
            cluster._start(
                training_operator,
                node=node,
                kueue_config=(kueue_config or {}) if kueue else None,
                container_mounts=container_mounts,
            )
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _start(
        self,
        options: TrainingOperatorOptions,
        *,
        node: bool,
        kueue_config: Mapping[str, Any] | None,
        container_mounts: Mapping[Path, str] | None,
    ) -> None:
        self._take_folder()
        ports = Ports()
        self._exit.callback(ports.close)
        machine = self._start_machine() if node else None
        self.control_plane = ControlPlane(self.folder, ports=ports, host=machine.host_address if machine else LOOPBACK)
        self._exit.callback(self._stop_processes)
        self._processes += self.control_plane.processes
        self.control_plane.start_api()
        self.training_operator = install_training_operator(
            self.control_plane, options=options, init_image=BUSYBOX, machine=machine
        )
        self.kwok = build_kwok(self.control_plane)
        added = [self.training_operator, self.kwok]
        if kueue_config is not None:
            added.append(install_kueue(self.control_plane, config=kueue_config))
        self.control_plane.start_controllers()
        self._processes += added
        with ThreadPoolExecutor() as pool:
            list(pool.map(Process.start, added))
        if machine:
            self._node = Node(machine, self.control_plane, container_mounts=container_mounts)
            self._processes += self._node.processes
            self._node.start()

    def _start_machine(self) -> Machine:
        machine = Machine(self.folder / "machine", hostname=NODE_NAME)
        self._exit.callback(machine.close)
        self._processes.append(machine.init)
        machine.start()
        return machine

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()) and not (self.folder / _LOCK).exists():
            raise ClusterError(f"{self.folder} is not empty, and no cluster was in it: it would be emptied")
        lock = (self.folder / _LOCK).open("a")
        self._exit.callback(lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"a cluster runs already in {self.folder}") from None
        end_leftovers(self.folder)
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _stop_processes(self) -> None:
        # Controllers first: what they would say about a missing API server is not worth reading.
        for process in reversed(self._processes):
            process.stop()

    def close(self) -> None:
        """End everything; the logs stay."""
        self._exit.close()

    def __enter__(self) -> TestCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return self.control_plane.url

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of the user `admin`."""
        return self.control_plane.kubeconfig

    @property
    def api_server(self) -> Process:
        """The API server, to be stopped, paused and started; it keeps its port and its data."""
        return self.control_plane.api_server

    @property
    def node(self) -> Node:
        """The real node.

        Raises:
            ClusterError: the cluster was started without one.
        """
        if self._node is None:
            raise ClusterError("this cluster has no real node: TestCluster.start(folder, node=True)")
        return self._node

    @property
    def processes(self) -> Mapping[str, Process]:
        """Every component by its name."""
        return {process.name: process for process in self._processes}

    def kubectl(self, *args: str | Path, input: str | None = None, kubeconfig: Path | None = None) -> str:
        """Run kubectl, as admin unless a kubeconfig is given, and return what it prints.

        Raises:
            ClusterError: it failed; the message has what it wrote on standard error.
        """
        return self.control_plane.kubectl(*args, input=input, kubeconfig=kubeconfig)

    def get(self, *args: str) -> Any:
        """Return what `kubectl get ... -o json` prints. Errors as `kubectl`."""
        return json.loads(self.kubectl("get", *args, "--output", "json"))

    def apply(self, objects: str | Iterable[Mapping[str, Any]], *, namespace: str | None = None) -> None:
        """Apply YAML text or objects on the server's side. Errors as `kubectl`."""
        text = (
            objects
            if isinstance(objects, str)
            else json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        )
        into = ("--namespace", namespace) if namespace else ()
        self.kubectl("apply", "--server-side", *into, "--filename", "-", input=text)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """Return a kubeconfig with a token of a ServiceAccount. Errors as `kubectl`."""
        return self.control_plane.service_account_kubeconfig(namespace, name)

    def create_namespace(self, name: str) -> None:
        """Make a namespace, and wait until it takes pods. Errors as `kubectl`."""
        self.kubectl("create", "namespace", name)
        self.control_plane.await_namespace(name)

    def audit(self) -> Iterator[dict[str, Any]]:
        """Yield an audit event for every request that the API server answered so far, oldest first."""
        return self.control_plane.audit()

    def logs(self) -> dict[str, Path]:
        """Return the log of every component by its name."""
        return {name: process.log for name, process in self.processes.items()}

    def log_tails(self) -> dict[str, str]:
        """Return the last lines of every component's log, in the order in which they started."""
        return {name: tail(log) for name, log in self.logs().items()}

    def add_fake_nodes(self, count: int, *, gpus: int = 8, cpu: int = 64, memory: str = "512Gi") -> list[str]:
        """Add nodes that are played, and wait until they are ready; return their names. Errors as `kubectl`."""
        taken = [node["metadata"]["name"] for node in self.get("nodes")["items"]]
        names = next_names(taken, count)
        nodes = [build_fake_node(name, gpus=gpus, cpu=cpu, memory=memory) for name in names]
        apply_objects(self.control_plane, nodes)
        self.kubectl(
            "wait", "--for=condition=Ready", f"--timeout={NODE_SECONDS:.0f}s", *(f"node/{name}" for name in names)
        )
        return names

    def remove_node(self, name: str) -> None:
        """Take a node away, as a machine that is given back: its pods go after a minute. Errors as `kubectl`."""
        self.kubectl("delete", "node", name, "--wait=false")

    def silence_node(self, name: str) -> None:
        """Let nobody play a fake node any more: its pods stay as they are until it is lost. Errors as `kubectl`."""
        self.kubectl("label", "node", name, f"{PLAYED}-")

    def await_json(self, *args: str, until: Callable[[Any], bool], what: str, seconds: float = NODE_SECONDS) -> Any:
        """Poll `get` until `until` is true of its answer, and return that answer.

        Raises:
            ClusterError: it was not in time.
        """

        def look() -> Any:
            answer = self.get(*args)
            return answer if until(answer) else None

        return poll(look, what=what, seconds=seconds)
