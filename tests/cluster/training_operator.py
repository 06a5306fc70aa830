"""The Kubeflow training operator as a process of this machine, with the RBAC and the webhook of its own manifests.

It owns how those manifests serve a controller outside the cluster; it must not know what jobs are made of.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.addresses import answers
from tests.cluster.components import TRAINING_OPERATOR, program
from tests.cluster.control_plane import ControlPlane
from tests.cluster.host_webhooks import (
    apply_objects,
    build_certificate_secret,
    point_webhooks_at,
    render,
    write_certificate,
)
from tests.cluster.machine import Machine
from tests.cluster.processes import Process

NAMESPACE = "kubeflow"
_SERVICE = "training-operator"
_SECRET = "training-operator-webhook-cert"
# Fixed in its source. It is looked at once at its start, and only for whether it is there; what is served with lies
# below $TMPDIR, so that clusters with other certificates can run beside each other.
_MARKER = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")
# As its own, except that the exit code of busybox's nslookup says nothing: it fails where a name has no AAAA record.
_INIT_CONTAINER = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  resources:
    limits: {cpu: 100m, memory: 20Mi}
    requests: {cpu: 50m, memory: 10Mi}
  command:
  - sh
  - -c
  - 'for i in $(seq {{.MaxTries}}); do nslookup {{.MasterAddr}} | grep -q ^Name: && exit 0; sleep 1; done; exit 1'
"""


@dataclass(frozen=True, kw_only=True)
class TrainingOperatorOptions:
    """How fast it may work; the values are those that it has when nobody says anything."""

    controller_threads: int = 1
    qps: int = 20
    burst: int = 30


TUNED = TrainingOperatorOptions(controller_threads=4, qps=100, burst=200)
"""Five times as fast, for tests in which its speed is not the subject."""


def install_training_operator(
    control_plane: ControlPlane,
    *,
    options: TrainingOperatorOptions,
    init_image: str,
    machine: Machine | None = None,
) -> Process:
    """Apply its manifests and return its process, which is not started yet; where there is a machine, it runs there.

    Raises:
        ClusterError: the API server refused one of its objects.
    """
    # Its webhook listens on every address, which a machine of its own keeps off this host's.
    host = machine.address if machine else control_plane.host
    port, health_port, metrics_port = (control_plane.ports.take() for _ in range(3))
    serving = control_plane.pki.issue(
        f"{_SERVICE}.{NAMESPACE}.svc", hosts=[f"{_SERVICE}.{NAMESPACE}.svc", "localhost", host]
    )
    temporary = control_plane.folder / "training-operator"
    write_certificate(temporary / _MARKER.relative_to("/tmp").parent, serving)
    template = temporary / "init-container.yaml"
    template.write_text(_INIT_CONTAINER)

    rendered = render(control_plane, TRAINING_OPERATOR.folder / "manifests" / "overlays" / "standalone")
    objects = [made for manifest in rendered if (made := _for_host(manifest))]
    point_webhooks_at(objects, url=f"https://{host}:{port}", ca_bundle=control_plane.pki.bundle)
    secret = build_certificate_secret(control_plane, namespace=NAMESPACE, name=_SECRET, serving=serving)
    apply_objects(control_plane, [*objects, secret])

    argv = [
        program(TRAINING_OPERATOR, "training-operator"),
        "--enable-scheme=pytorchjob",
        f"--webhook-server-port={port}",
        f"--metrics-bind-address={host}:{metrics_port}",
        f"--health-probe-bind-address={host}:{health_port}",
        f"--controller-threads={options.controller_threads}",
        f"--kube-api-qps={options.qps}",
        f"--kube-api-burst={options.burst}",
        f"--pytorch-init-container-image={init_image}",
        f"--pytorch-init-container-template-file={template}",
    ]
    env = {
        "KUBECONFIG": str(control_plane.service_account_kubeconfig(NAMESPACE, "training-operator")),
        "MY_POD_NAMESPACE": NAMESPACE,
        "TMPDIR": str(temporary),
    }
    healthy = answers(f"http://{host}:{health_port}/readyz")

    def ready() -> bool:
        _MARKER.parent.mkdir(parents=True, exist_ok=True)
        _MARKER.touch()
        if not healthy():
            return False
        _remove_marker()
        return True

    if machine:
        return machine.process("training-operator", argv, env=env, ready=ready)
    return Process("training-operator", argv, folder=control_plane.folder, env=env, ready=ready)


def _for_host(manifest: dict[str, Any]) -> dict[str, Any] | None:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if kind in {"Deployment", "Service", "Secret"}:
        return None
    if kind == "CustomResourceDefinition" and name != "pytorchjobs.kubeflow.org":
        return None
    if kind == "ValidatingWebhookConfiguration":
        webhooks = [hook for hook in manifest["webhooks"] if "pytorchjobs" in hook["rules"][0]["resources"]]
        return {**manifest, "webhooks": webhooks}
    return manifest


def _remove_marker() -> None:
    # Another cluster that is just starting makes it again.
    with suppress(OSError):
        if _MARKER.stat().st_size == 0:
            _MARKER.unlink()
            _MARKER.parent.rmdir()
            _MARKER.parent.parent.rmdir()
