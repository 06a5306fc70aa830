"""The programs that a test cluster is made of: what is pinned, where it lies when built, and what is missing.

It owns names and places; it must not build or start anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.local.environments import cache_root
from tests.cluster.requirements import why_no_node

MODULES = Path(__file__).parent / "go"
ROOT = Path(__file__).parents[2]
KUBERNETES_VERSION = "v1.36.3"
_KUBERNETES_LDFLAGS = f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}"


@dataclass(frozen=True, kw_only=True)
class Component:
    """Programs from one pinned Go module, built together."""

    name: str
    module: str
    """Its folder under go/: a go.mod and a go.sum."""
    packages: Mapping[str, str]
    """Program to Go package."""
    ldflags: str = "-s -w"
    manifests: Mapping[str, str] = field(default_factory=dict)
    """Go module to a folder in it, which is copied beside the programs."""

    @property
    def module_folder(self) -> Path:
        """Where its go.mod lies."""
        return MODULES / self.module

    @property
    def folder(self) -> Path:
        """Where it lies when built: a folder is complete, or not there."""
        digest = hashlib.sha256()
        for file in ("go.mod", "go.sum"):
            digest.update((self.module_folder / file).read_bytes() + b"\0")
        recipe = [_go_version(self.module_folder), self.ldflags, self.needed_packages, dict(self.manifests)]
        digest.update(json.dumps(recipe).encode())
        return cache_root().absolute() / "cluster" / f"{self.name}-{digest.hexdigest()[:12]}"

    @property
    def needed_packages(self) -> dict[str, str]:
        """The programs that $KUBEBUILDER_ASSETS does not have."""
        return {name: package for name, package in self.packages.items() if given_program(name) is None}

    def is_built(self) -> bool:
        """Return whether nothing of it is left to build."""
        return self.folder.is_dir() or not (self.needed_packages or self.manifests)


KUBERNETES = Component(
    name="kubernetes",
    module="kubernetes",
    packages={
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
    },
    ldflags=_KUBERNETES_LDFLAGS,
)
ETCD = Component(name="etcd", module="etcd", packages={"etcd": "go.etcd.io/etcd/server/v3"})
TRAINING_OPERATOR = Component(
    name="training-operator",
    module="training-operator",
    packages={"training-operator": "github.com/kubeflow/training-operator/cmd/training-operator.v1"},
    manifests={"github.com/kubeflow/training-operator": "manifests"},
)
KWOK = Component(
    name="kwok",
    module="kwok",
    packages={"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
    manifests={"sigs.k8s.io/kwok": "kustomize/stage"},
)
NODE = Component(
    name="node",
    module="kubernetes",
    packages={name: f"k8s.io/kubernetes/cmd/{name}" for name in ("kubelet", "kube-proxy")},
    ldflags=_KUBERNETES_LDFLAGS,
)
CONTAINERD = Component(
    name="containerd",
    module="containerd",
    packages={
        name: f"github.com/containerd/containerd/v2/cmd/{name}"
        for name in ("containerd", "containerd-shim-runc-v2", "ctr")
    },
)
COREDNS = Component(name="coredns", module="coredns", packages={"coredns": "github.com/coredns/coredns"})
HELM = Component(name="helm", module="helm", packages={"helm": "helm.sh/helm/v4/cmd/helm"})
KUEUE = Component(
    name="kueue",
    module="kueue",
    packages={"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
    manifests={"sigs.k8s.io/kueue": "config"},
)

PARTS: Mapping[str, tuple[Component, ...]] = {
    "control-plane": (KUBERNETES, ETCD, TRAINING_OPERATOR, KWOK),
    "node": (NODE, CONTAINERD, COREDNS, HELM),
    "kueue": (KUEUE,),
}
"""What a tier of tests needs, in the order in which it is built."""


def given_program(name: str) -> Path | None:
    """Return a program from $KUBEBUILDER_ASSETS (setup-envtest's), if it is there."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    return Path(folder) / name if folder and (Path(folder) / name).is_file() else None


def program(component: Component, name: str) -> Path:
    """Return a built program."""
    return given_program(name) or component.folder / "bin" / name


def why_not(part: str) -> str | None:
    """Return why a part cannot be run here, or None if it can."""
    if reason := why_not_here(part):
        return reason
    missing = [component.name for component in PARTS[part] if not component.is_built()]
    return f"not built: {', '.join(missing)} (make cluster-binaries)" if missing else None


def why_not_here(part: str) -> str | None:
    """Return what this machine lacks for a part, built or not; None if it lacks nothing."""
    if sys.platform != "linux":
        return "the test cluster runs on Linux only"
    if shutil.which("go") is None:
        return "Go is not installed (https://go.dev/dl), and the cluster's programs are built from pinned Go modules"
    return why_no_node() if part == "node" else None


@functools.cache
def _go_version(module_folder: Path) -> str:
    # In the module's folder: its go.mod may ask for another toolchain than the one installed.
    asked = ("go", "env", "GOVERSION", "GOOS", "GOARCH")
    return subprocess.run(asked, cwd=module_folder, check=True, capture_output=True, text=True).stdout
