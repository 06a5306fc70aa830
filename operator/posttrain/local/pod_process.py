"""From a pod to the process that it is on this machine.

It owns every difference between the two: mount roots, addresses, the interpreter and the machine's own variables; it
must not start anything, nor look whether a path exists.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.contract.environment import LISTEN
from posttrain.local.container import Command
from posttrain.local.needs import count_gpus, image_repository
from posttrain.local.network import Network
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

    interpreters: Mapping[str, Path]
    """Of the images' environments, by the repository of each image."""
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
    """The data of each Secret that is the user's."""

    def interpreter(self, container: Mapping[str, Any]) -> Path:
        """Return the interpreter of a container's image."""
        return self.interpreters[image_repository(container.get("image", ""))]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is one pod's on this machine."""

    cwd: Path
    roots: Mapping[str, Path]
    """What is there for each mountPath."""
    network: Network
    secrets: Mapping[str, Mapping[str, str]]
    """The data of each Secret, the run's own among them."""
    gpus: tuple[str, ...]
    """As many of the machine's GPUs as it asks for."""


def build_process(pod: Manifest, *, site: Site, given: Surroundings) -> Command:
    """Return the process of a pod's only container."""
    container = pod["spec"]["containers"][0]
    interpreter = site.interpreter(container)
    own = _own_env(pod, container=container, site=site, given=given)
    # In a cluster the device plugin sees to it that a pod has its GPUs, and without any sees none.
    devices = {_VISIBLE_GPUS: ",".join(given.gpus)} if site.gpus else {}
    env = {**_machine_env(site, interpreter=interpreter), **devices, **own}
    own_code = [own["PYTHONPATH"]] if "PYTHONPATH" in own else []
    env["PYTHONPATH"] = os.pathsep.join([*own_code, str(site.packages)])
    words: list[str] = [*container.get("command", ()), *container.get("args", ())]
    program = str(interpreter) if words[0] == "python" else words[0]
    return Command(argv=(program, *words[1:]), env=env, cwd=given.cwd)


def choose_gpus(pod: Manifest, *, site: Site, taken: Collection[str]) -> tuple[str, ...]:
    """Return the GPUs that a pod gets, as many as it asks for, none of those that others have."""
    count = count_gpus(pod, resource=site.gpu_resource) if site.gpus else 0
    free = [gpu for gpu in site.gpus if gpu not in taken]
    assert count <= len(free), f"{pod['metadata']['name']} asks for {count} GPUs, and {len(free)} are free"
    return tuple(free[:count])


def _own_env(pod: Manifest, *, container: Mapping[str, Any], site: Site, given: Surroundings) -> dict[str, str]:
    """Return what the pod's own spec says."""
    env: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        env |= given.secrets[source["secretRef"]["name"]]
    for variable in container.get("env", ()):
        source = variable.get("valueFrom")
        if source is None and variable["name"] == LISTEN:
            env[LISTEN] = given.network.listen(pod, variable["value"])
        elif source is None:
            env[variable["name"]] = _localize(variable.get("value", ""), site=site, given=given)
        elif "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            env[variable["name"]] = given.secrets[reference["name"]][reference["key"]]
        else:
            env[variable["name"]] = _field(source["fieldRef"]["fieldPath"], pod=pod, site=site)
    return env


def _localize(value: str, *, site: Site, given: Surroundings) -> str:
    if value.startswith(site.planned_server):
        return site.server + value.removeprefix(site.planned_server)
    # The longest first: a mount may lie below another one.
    for mount in sorted(given.roots, key=len, reverse=True):
        if value == mount or value.startswith(f"{mount}/"):
            return str(given.roots[mount] / value.removeprefix(mount).lstrip("/"))
    return given.network.localize(value)


def _field(path: str, *, pod: Manifest, site: Site) -> str:
    match path:
        case "metadata.name" | "metadata.namespace" | "metadata.uid":
            return str(pod["metadata"][path.removeprefix("metadata.")])
        case "spec.nodeName":
            return site.node_name
    raise ValueError(f"no pod of a plan refers to the field {path}")


def _machine_env(site: Site, *, interpreter: Path) -> dict[str, str]:
    env = {name: site.machine[name] for name in MACHINE_VARIABLES if name in site.machine}
    env["PATH"] = os.pathsep.join([str(interpreter.parent), *([env["PATH"]] if "PATH" in env else [])])
    if any(name.upper().endswith("_PROXY") for name in env):
        # What is on this machine is reached without the proxy.
        env |= {name: ",".join(filter(None, (site.machine.get(name), _THIS_MACHINE))) for name in _NO_PROXY}
    return env
