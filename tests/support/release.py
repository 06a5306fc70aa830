"""A cluster with a real node, posttrain as `helm install` brings it there, and the storage that runs find.

It owns the values of the release and where claims lie on this host; it must not know what a test is about.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from posttrain.local.environments import cache_root, ensure_environment
from tests.cluster.cluster import TestCluster
from tests.cluster.product_images import (
    OPERATOR_REPOSITORY,
    TRAINER,
    TRAINER_LIBRARIES,
    build_operator_image,
    build_trainer_image,
)
from tests.support.helm import CHART, helm
from tests.support.operator_process import add_claim

NAMESPACE = "posttrain-system"
_USER = 10001
"""Of the images; a volume of this host belongs to nobody else's group."""
PROFILE: dict[str, Any] = {"cpu": "800m", "memory": "3Gi", "sharedMemory": "256Mi"}
_SETTINGS: dict[str, Any] = {
    "images": {"trainer": TRAINER},
    "profiles": {"default": PROFILE},
    "prepareCpu": "1",
    "prepareMemory": "3Gi",
    "terminationGraceSeconds": 30,
}


def start_node(folder: Path, *, kueue: bool = False) -> TestCluster:
    """Start a cluster whose real node has the trainer's libraries."""
    python = ensure_environment("trainer", cache=cache_root(), report=print)
    libraries = next(python.parents[1].glob("lib/python3.*/site-packages"))
    return TestCluster.start(folder, node=True, kueue=kueue, container_mounts={libraries: TRAINER_LIBRARIES})


def load_images(cluster: TestCluster) -> None:
    """Give the real node the images of operator and trainer."""
    for archive in (build_trainer_image(), build_operator_image()):
        cluster.node.load_image(archive)


def write_values(file: Path, *, tag: str = "1", **settings: Any) -> None:
    """Write the chart's values for the images that a node was given, and these settings."""
    values = {
        "image": {"repository": OPERATOR_REPOSITORY, "tag": tag, "pullPolicy": "Never"},
        "replicas": 1,
        "settings": {**_SETTINGS, **settings},
    }
    file.write_text(yaml.safe_dump(values))


class Release:
    """The chart, installed as `posttrain`."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster = cluster

    @classmethod
    def install(cls, cluster: TestCluster) -> Release:
        """Install it on a real node, its operator a pod of its own image."""
        load_images(cluster)
        release = cls(cluster)
        release.upgrade()
        return release

    def upgrade(self, *, tag: str = "1", **settings: Any) -> None:
        """Install the chart or upgrade to these values, and wait until the operator is ready."""
        file = self.cluster.folder / "release.yaml"
        write_values(file, tag=tag, **settings)
        helm(
            *("upgrade", "posttrain", CHART, "--install", "--create-namespace", "--namespace", NAMESPACE),
            *("--kubeconfig", self.cluster.kubeconfig, "--values", file),
        )
        self.await_operator()

    def await_operator(self) -> None:
        """Wait until the operator's pods are ready."""
        self.cluster.kubectl(
            *("rollout", "status", "deployment/posttrain-operator", "--namespace", NAMESPACE, "--timeout=120s")
        )


def add_storage(cluster: TestCluster, namespace: str, name: str, *, copies: dict[str, Path] | None = None) -> Path:
    """Make a claim whose volume is a folder of this host, with copies of files or folders in it; return the folder."""
    folder = cluster.folder / "volumes" / namespace / name
    folder.mkdir(parents=True)
    for target, source in (copies or {}).items():
        if source.is_dir():
            shutil.copytree(source, folder / target)
        else:
            shutil.copy(source, folder / target)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    # Group and mode as a volume gets them by fsGroup, which the kubelet does not apply to a folder of the host.
    os.chown(folder, 0, _USER)
    folder.chmod(0o2775)
    add_claim(cluster, namespace, name, folder=folder, size="10Gi")
    return folder
