"""Upstream manifests for a controller that runs beside the cluster and not in it.

It owns rendering, applying and pointing webhooks at an address of this machine; it must not know which controller.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane
from tests.cluster.pki import KeyPair

_FIRST_KINDS = ("Namespace", "CustomResourceDefinition")
_LAST_KINDS = ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")


def render(control_plane: ControlPlane, folder: Path) -> list[dict[str, Any]]:
    """Return what `kubectl kustomize` makes of a folder.

    Raises:
        ClusterError: it is no kustomization.
    """
    text = control_plane.kubectl("kustomize", folder)
    return [manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]


def apply_objects(control_plane: ControlPlane, objects: Iterable[Mapping[str, Any]]) -> None:
    """Apply objects on the server's side, as whoever ran before may have: definitions first, webhooks last.

    Raises:
        ClusterError: the API server refused one.
    """
    items = sorted(objects, key=lambda manifest: _order(manifest["kind"]))
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "--filename", "-", input=text)


def point_webhooks_at(objects: Iterable[dict[str, Any]], *, url: str, ca_bundle: str) -> None:
    """Replace the Service of every webhook, and of every conversion, by a URL.

    A Service would not do: an EndpointSlice may not have a loopback address.
    """
    for manifest in objects:
        hooks = list(manifest.get("webhooks", ()))
        if manifest["kind"] == "CustomResourceDefinition" and "webhook" in manifest["spec"].get("conversion", {}):
            hooks.append(manifest["spec"]["conversion"]["webhook"])
        for hook in hooks:
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"{url}{path}", "caBundle": ca_bundle}


def build_certificate_secret(
    control_plane: ControlPlane, *, namespace: str, name: str, serving: KeyPair
) -> dict[str, Any]:
    """Return the Secret in which a controller's certificate rotator finds everything valid, and leaves it."""
    authority = control_plane.pki.files
    files = {
        "ca.crt": authority.certificate,
        "ca.key": authority.key,
        "tls.crt": serving.certificate,
        "tls.key": serving.key,
    }
    data = {key: base64.b64encode(file.read_bytes()).decode() for key, file in files.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": data}


def write_certificate(folder: Path, serving: KeyPair) -> None:
    """Write a certificate where controller-runtime's webhook server looks for one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tls.crt").write_bytes(serving.certificate.read_bytes())
    (folder / "tls.key").write_bytes(serving.key.read_bytes())


def _order(kind: str) -> int:
    if kind in _FIRST_KINDS:
        return _FIRST_KINDS.index(kind)
    return len(_FIRST_KINDS) + (kind in _LAST_KINDS)
