"""From a pod to the process that it is on this machine.

It owns every difference between the two: mount roots, the server's address, the interpreter and the machine's own
variables; it must not start anything, nor look whether a path exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.local.container import Command
from posttrain.plan.types import Manifest

MACHINE_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Variables that a process gets from this machine: in a container the image and the cluster see to them."""

_NO_PROXY = ("NO_PROXY", "no_proxy")
_THIS_MACHINE = "127.0.0.1,localhost"
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is this machine's, the same for every pod of a run."""

    interpreter: Path
    """Of the image's environment."""
    packages: Path
    """Folder with posttrain and posttrain_workloads."""
    machine: Mapping[str, str]
    """This process's environment, of which `MACHINE_VARIABLES` are passed on."""
    planned_server: str
    """The progress server's address in the plan's objects."""
    server: str
    """Its address here."""
    node_name: str
    gpu_resource: str
    gpus: tuple[str, ...]
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The data of each Secret."""


def build_process(pod: Manifest, *, roots: Mapping[str, Path], cwd: Path, site: Site) -> Command:
    """Return the process of a pod's only container; `roots` maps each mountPath to what is there on this machine."""
    container = pod["spec"]["containers"][0]
    given = _given_env(pod, container=container, roots=roots, site=site)
    env = {**_machine_env(site), **_device_env(container, site=site), **given}
    own_code = [given["PYTHONPATH"]] if "PYTHONPATH" in given else []
    env["PYTHONPATH"] = os.pathsep.join([*own_code, str(site.packages)])
    words: list[str] = [*container.get("command", ()), *container.get("args", ())]
    program = str(site.interpreter) if words[0] == "python" else words[0]
    return Command(argv=(program, *words[1:]), env=env, cwd=cwd)


def _given_env(pod: Manifest, *, container: Mapping[str, Any], roots: Mapping[str, Path], site: Site) -> dict[str, str]:
    """Return what the pod's own spec says."""
    env: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        env |= site.secrets[source["secretRef"]["name"]]
    for variable in container.get("env", ()):
        source = variable.get("valueFrom")
        if source is None:
            env[variable["name"]] = _localize(variable.get("value", ""), roots=roots, site=site)
        elif "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            env[variable["name"]] = site.secrets[reference["name"]][reference["key"]]
        else:
            env[variable["name"]] = _field(source["fieldRef"]["fieldPath"], pod=pod, site=site)
    return env


def _localize(value: str, *, roots: Mapping[str, Path], site: Site) -> str:
    if value.startswith(site.planned_server):
        return site.server + value.removeprefix(site.planned_server)
    # The longest first: a mount may lie below another one.
    for mount in sorted(roots, key=len, reverse=True):
        if value == mount or value.startswith(f"{mount}/"):
            return str(roots[mount] / value.removeprefix(mount).lstrip("/"))
    return value


def _field(path: str, *, pod: Manifest, site: Site) -> str:
    match path:
        case "metadata.name" | "metadata.namespace" | "metadata.uid":
            return str(pod["metadata"][path.removeprefix("metadata.")])
        case "spec.nodeName":
            return site.node_name
    raise ValueError(f"no pod of a plan refers to the field {path}")


def _machine_env(site: Site) -> dict[str, str]:
    env = {name: site.machine[name] for name in MACHINE_VARIABLES if name in site.machine}
    env["PATH"] = os.pathsep.join([str(site.interpreter.parent), *([env["PATH"]] if "PATH" in env else [])])
    if any(name.upper().endswith("_PROXY") for name in env):
        # The progress server is reached without the proxy.
        env |= {name: ",".join(filter(None, (site.machine.get(name), _THIS_MACHINE))) for name in _NO_PROXY}
    return env


def _device_env(container: Mapping[str, Any], *, site: Site) -> dict[str, str]:
    """Return which GPUs are the pod's: in a cluster the device plugin sees to it, and without any it sees none."""
    if not site.gpus:
        return {}
    count = int(container.get("resources", {}).get("limits", {}).get(site.gpu_resource, 0))
    return {_VISIBLE_GPUS: ",".join(site.gpus[:count])}
