"""Kueue as a process of this machine, with the RBAC and the webhooks of its own manifests.

It owns how those manifests serve a controller outside the cluster; it must not make a queue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.cluster.addresses import answers
from tests.cluster.components import KUEUE, program
from tests.cluster.control_plane import ControlPlane
from tests.cluster.host_webhooks import (
    apply_objects,
    build_certificate_secret,
    point_webhooks_at,
    render,
    write_certificate,
)
from tests.cluster.processes import Process

NAMESPACE = "kueue-system"
_SERVICE = "kueue-webhook-service"
_SECRET = "kueue-webhook-server-cert"
_FRAMEWORKS = {"batch/job": "jobs", "kubeflow.org/pytorchjob": "pytorchjobs"}
"""Integration to the resource whose webhooks go with it; the other frameworks are not in the cluster."""
_OWN_GROUP = "kueue.x-k8s.io"
# An APIService that nobody serves keeps namespaces from being deleted.
_LEFT_OUT = {"Deployment", "Service", "Secret", "APIService"}


def install_kueue(control_plane: ControlPlane, *, config: Mapping[str, Any]) -> Process:
    """Apply its manifests and return its process, which is not started yet.

    `config` is put over the top level of Kueue's configuration, as in `{"waitForPodsReady": {...}}`.

    Raises:
        ClusterError: the API server refused one of its objects.
    """
    folder = control_plane.folder / "kueue"
    port, health_port, metrics_port = (control_plane.ports.take() for _ in range(3))
    name = f"{_SERVICE}.{NAMESPACE}.svc"
    serving = control_plane.pki.issue(name, hosts=[name, control_plane.host])
    write_certificate(folder, serving)
    rendered = render(control_plane, KUEUE.folder / "manifests" / "default")
    objects = [made for manifest in rendered if (made := _for_host(manifest))]
    point_webhooks_at(objects, url=f"https://{control_plane.host}:{port}", ca_bundle=control_plane.pki.bundle)
    secret = build_certificate_secret(control_plane, namespace=NAMESPACE, name=_SECRET, serving=serving)
    apply_objects(control_plane, [*objects, secret])

    file = folder / "config.yaml"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "config.kueue.x-k8s.io/v1beta2",
                "kind": "Configuration",
                "namespace": NAMESPACE,
                "health": {"healthProbeBindAddress": f"{control_plane.host}:{health_port}"},
                "metrics": {"bindAddress": f"{control_plane.host}:{metrics_port}"},
                "webhook": {"host": control_plane.host, "port": port, "certDir": str(folder)},
                "leaderElection": {"leaderElect": False},
                # Else it looks for a certificate for its metrics in a fixed folder.
                "internalCertManagement": {
                    "enable": True,
                    "webhookServiceName": _SERVICE,
                    "webhookSecretName": _SECRET,
                },
                "featureGates": {"VisibilityOnDemand": False},
                "clientConnection": {"qps": 300, "burst": 500},
                "integrations": {"frameworks": list(_FRAMEWORKS)},
                **config,
            },
            indent=2,
        )
    )
    account = control_plane.service_account_kubeconfig(NAMESPACE, "kueue-controller-manager")
    return Process(
        "kueue",
        [program(KUEUE, "kueue"), f"--config={file}", "--zap-log-level=2"],
        folder=control_plane.folder,
        env={"KUBECONFIG": str(account)},
        ready=answers(f"http://{control_plane.host}:{health_port}/readyz"),
    )


def _for_host(manifest: dict[str, Any]) -> dict[str, Any] | None:
    if manifest["kind"] in _LEFT_OUT:
        return None
    if "webhooks" in manifest:
        return {**manifest, "webhooks": [hook for hook in manifest["webhooks"] if _is_served(hook["rules"])]}
    return manifest


def _is_served(rules: list[dict[str, Any]]) -> bool:
    return any(_OWN_GROUP in rule["apiGroups"] or set(_FRAMEWORKS.values()) & set(rule["resources"]) for rule in rules)
