"""A Kubernetes cluster for tests, in one folder and gone with the process that started it.

It owns what is started, in which order, and what a test may do to it; it must not build anything.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cluster.addresses import LOOPBACK, Ports
from tests.cluster.any_cluster import Cluster
from tests.cluster.components import why_not
from tests.cluster.control_plane import KWOK, NODE_NAME, ControlPlane
from tests.cluster.errors import ClusterError
from tests.cluster.images import BUSYBOX
from tests.cluster.kueue import install_kueue
from tests.cluster.kwok import build_kwok
from tests.cluster.machine import Machine
from tests.cluster.node import Node
from tests.cluster.processes import Process, end_leftovers
from tests.cluster.training_operator import TUNED, TrainingOperatorOptions, install_training_operator

_LOCK = "test-cluster.lock"


class TestCluster(Cluster):
    """A cluster of processes of this one; a real node and Kueue where asked for.

    Use it as a context: at its end, or when this process dies, its processes end.
    """

    __test__ = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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
        self.access = self.control_plane
        self._exit.callback(self._stop_processes)
        self._processes += self.control_plane.processes
        self.control_plane.start_api()
        self.training_operator = install_training_operator(
            self.control_plane, options=options, init_image=BUSYBOX, machine=machine
        )
        self.kwok = build_kwok(self.folder, kubeconfig=self.control_plane.user_kubeconfig(KWOK))
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

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return self.control_plane.url

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

    def audit(self) -> Iterator[dict[str, Any]]:
        """Yield an audit event for every request that the API server answered so far, oldest first."""
        return self.control_plane.audit()
