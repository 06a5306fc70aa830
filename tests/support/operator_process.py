"""The operator as a process of this machine, beside a test cluster, and pods that report to it as workloads do.

It owns how both are started and reached; it must not know what a test is about.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from posttrain.contract.facts import FactsReply, FactsReport
from posttrain.plan.names import resource_path
from tests.cluster.addresses import Ports
from tests.cluster.any_cluster import Cluster
from tests.cluster.kwok import NODE_SELECTOR, TOLERATION
from tests.cluster.processes import Process, tail
from tests.support.certificates import TestAuthority

NAMESPACE = "posttrain-system"
_HTTP_SECONDS = 10.0

FAKE_NODES_PROFILE: Mapping[str, Any] = {
    "nodeSelector": dict(NODE_SELECTOR),
    "tolerations": [dict(TOLERATION)],
    "cpu": "1",
    "memory": "1Gi",
    "pricePerGpuHour": "3.60",
}


class OperatorProcess:
    """One replica."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        python: Path,
        name: str = "operator",
        kubeconfig: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ports = Ports()
        self.health_port, self.serve_port = self._ports.take(), self._ports.take()
        self.certificate = TestAuthority().write(folder / "tls")
        self.url = f"https://127.0.0.1:{self.serve_port}"
        data: dict[str, Any] = {
            "images": {"trainer": "registry.test/trainer:1"},
            "profiles": {"default": dict(FAKE_NODES_PROFILE)},
            "sandbox": {name: FAKE_NODES_PROFILE[name] for name in ("nodeSelector", "tolerations")},
            "progressServer": {"url": self.url},
            "terminationGraceSeconds": 1,
            **(settings or {}),
        }
        self.settings_file = folder / "settings.yaml"
        self.settings_file.write_text(yaml.safe_dump(data))
        options = {
            "settings": self.settings_file,
            "kubeconfig": kubeconfig or cluster.kubeconfig,
            "namespace": NAMESPACE,
            "identity": name,
            "health-address": f"127.0.0.1:{self.health_port}",
            "serve-address": f"127.0.0.1:{self.serve_port}",
            "tls-certificate": self.certificate.certificate,
            "tls-key": self.certificate.key,
            "tls-authority": self.certificate.authority,
        }
        argv = [python, "-m", "posttrain.control", *(f"--{key}={value}" for key, value in options.items())]
        self.process = Process(name, argv, folder=folder, ready=self.is_ready)

    def is_ready(self) -> bool:
        """Return whether it says that it is."""
        return self.readiness()[0] == 200

    def readiness(self) -> tuple[int, str]:
        """Return what /readyz answers; status 0 where nothing does."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/readyz", timeout=_HTTP_SECONDS) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def is_alive(self) -> bool:
        """Return whether /healthz says so."""
        try:
            url = f"http://127.0.0.1:{self.health_port}/healthz"
            with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as found:
                return bool(found.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End it at once, without a word."""
        os.kill(self.process.pid, signal.SIGKILL)

    def log_tails(self) -> dict[str, str]:
        """Return the end of its log."""
        return {self.process.name: tail(self.process.log)}

    def close(self) -> None:
        """End it."""
        self.process.stop()
        self._ports.close()

    def report(self, cluster: Cluster, namespace: str, pod: str, report: FactsReport) -> FactsReply:
        """Post facts as a pod does: with a token of its own, bound to it, for its run alone.

        Raises:
            urllib.error.HTTPError: the server refused them.
        """
        labels = cluster.get("pod", pod, "--namespace", namespace)["metadata"]["labels"]
        path = resource_path(namespace=namespace, run=labels["posttrain.dev/run"])
        request = urllib.request.Request(
            f"{self.url}/{path}/facts",
            data=report.model_dump_json().encode(),
            headers={"Authorization": f"Bearer {pod_token(cluster, namespace, pod, audience=path)}"},
        )
        context = ssl.create_default_context(cafile=str(self.certificate.authority))
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS, context=context) as answer:
            return FactsReply.model_validate_json(answer.read())


class Replicas:
    """The operators of one test, which end with it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._started: list[OperatorProcess] = []

    def add(
        self, name: str, *, kubeconfig: Path | None = None, settings: Mapping[str, Any] | None = None
    ) -> OperatorProcess:
        """Start a replica, and wait until it is ready.

        Raises:
            ClusterError: it is not in time; the message has the end of its log.
        """
        operator = OperatorProcess(
            self._cluster,
            self._folder / name,
            python=Path(sys.executable),
            name=name,
            kubeconfig=kubeconfig,
            settings=settings,
        )
        self._started.append(operator)
        operator.process.start()
        return operator

    def log_tails(self) -> dict[str, str]:
        """Return the end of every replica's log by its name."""
        return {name: text for operator in self._started for name, text in operator.log_tails().items()}

    def close(self) -> None:
        """End them."""
        for operator in self._started:
            operator.close()


def pod_token(cluster: Cluster, namespace: str, pod: str, *, audience: str) -> str:
    """Return a token as the kubelet projects it into a pod."""
    account = cluster.get("pod", pod, "--namespace", namespace)["spec"]["serviceAccountName"]
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}")
    return cluster.kubectl(
        "create", "token", account, "--namespace", namespace, f"--audience={audience}", *bound
    ).strip()


def add_claim(
    cluster: Cluster,
    namespace: str,
    name: str,
    *,
    folder: Path = Path("/nowhere"),
    size: str = "1Gi",
    must_exist: bool = False,
) -> None:
    """Make a claim with its volume, a folder of the node; nodes that are played mount nothing.

    `must_exist`: the node mounts no folder that is not there, instead of making it.
    """
    volume = f"{namespace}-{name}"
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    cluster.apply(
        [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": {
                    **shared,
                    "capacity": {"storage": size},
                    "hostPath": {"path": str(folder), "type": "Directory" if must_exist else ""},
                    "claimRef": {"namespace": namespace, "name": name},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {**shared, "volumeName": volume, "resources": {"requests": {"storage": size}}},
            },
        ]
    )
