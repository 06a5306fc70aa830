"""Upstream manifests for a controller that runs beside the cluster and not in it.

It owns rendering, applying and pointing webhooks at an address of this machine; it must not know which controller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane

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
    """Replace the Service of every webhook by a URL: an EndpointSlice may not have a loopback address."""
    for manifest in objects:
        for webhook in manifest.get("webhooks", ()):
            path = webhook["clientConfig"].get("service", {}).get("path", "")
            webhook["clientConfig"] = {"url": f"{url}{path}", "caBundle": ca_bundle}


def _order(kind: str) -> int:
    if kind in _FIRST_KINDS:
        return _FIRST_KINDS.index(kind)
    return len(_FIRST_KINDS) + (kind in _LAST_KINDS)
