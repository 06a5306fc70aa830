"""What a test may ask of any cluster, whoever started it.

It owns requests and nodes that are played; it must not stop, pause or read what a cluster is made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.access import Access
from tests.cluster.kwok import PLAYED, build_fake_node, next_names
from tests.cluster.processes import Process, poll, tail

NODE_SECONDS = 60.0


class Cluster:
    """A control plane with the training operator, and KWOK for fake nodes. Use it as a context."""

    access: Access

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake_nodes: list[str] = []
        """The nodes that were added here, in that order; some may have been removed since."""
        self._exit = ExitStack()
        self._processes: list[Process] = []

    def close(self) -> None:
        """End everything; the logs stay."""
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig of somebody who may do everything."""
        return self.access.kubeconfig

    def kubectl(self, *args: str | Path, input: str | None = None, kubeconfig: Path | None = None) -> str:
        """Run kubectl, as somebody who may do everything unless a kubeconfig is given, and return what it prints.

        Raises:
            ClusterError: it failed; the message has what it wrote on standard error.
        """
        return self.access.kubectl(*args, input=input, kubeconfig=kubeconfig)

    def get(self, *args: str) -> Any:
        """Return what `kubectl get ... -o json` prints. Errors as `kubectl`."""
        return json.loads(self.kubectl("get", *args, "--output", "json"))

    def apply(self, objects: str | Iterable[Mapping[str, Any]], *, namespace: str | None = None) -> None:
        """Apply YAML text or objects on the server's side. Errors as `kubectl`."""
        text = objects if isinstance(objects, str) else to_list(objects)
        into = ("--namespace", namespace) if namespace else ()
        self.kubectl("apply", "--server-side", *into, "--filename", "-", input=text)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """Return a kubeconfig with a token of a ServiceAccount. Errors as `kubectl`."""
        return self.access.service_account_kubeconfig(namespace, name)

    def create_namespace(self, name: str) -> None:
        """Make a namespace, and wait until it takes pods. Errors as `kubectl`."""
        self.kubectl("create", "namespace", name)
        self.access.await_namespace(name)

    def log_tails(self) -> dict[str, str]:
        """Return the last lines of every component's log, in the order in which they started."""
        return {process.name: tail(process.log) for process in self._processes}

    def add_fake_nodes(self, count: int, *, gpus: int = 8, cpu: int = 64, memory: str = "512Gi") -> list[str]:
        """Add nodes that are played, and wait until they are ready; return their names. Errors as `kubectl`."""
        taken = [node["metadata"]["name"] for node in self.get("nodes")["items"]]
        names = next_names(taken, count)
        self.apply([build_fake_node(name, gpus=gpus, cpu=cpu, memory=memory) for name in names])
        self.fake_nodes += names
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


def to_list(objects: Iterable[Mapping[str, Any]]) -> str:
    """Return objects as one that kubectl reads from a file."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
