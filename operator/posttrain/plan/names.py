"""The names of a run's children.

It owns how a child's name follows from the run's; it must not build the children.
"""

from __future__ import annotations

import hashlib
import re

from posttrain.api.base import GROUP
from posttrain.api.servers import RolloutServers

PREPARE_ATTEMPT = 0
"""The number under which prepare reports; attempts of the gang count from 1."""

_ATTEMPT = re.compile(r"^(?P<run>.+)-a(?P<attempt>[1-9][0-9]*)$")
_SERVER_POD = re.compile(r"^(?P<servers>.+)-(?P<ordinal>0|[1-9][0-9]*)$")
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_RESOURCE_PATH = re.compile(
    rf"apis/{re.escape(GROUP)}/v1alpha1/namespaces/(?P<namespace>{_LABEL})/trainingruns/(?P<run>{_LABEL})"
)


def service_account_name(run: str) -> str:
    """Return the name of the run's service account."""
    return run


def claim_name(run: str) -> str:
    """Return the name of the claim made for the run."""
    return run


def network_policy_name(run: str) -> str:
    """Return the name of the run's network policy."""
    return run


def code_name(run: str) -> str:
    """Return the name of the ConfigMap that holds the snapshot of the run's own code."""
    return f"{run}-code"


def workload_name(run: str) -> str:
    """Return the name of the Workload that asks for the run's quota."""
    return run


def prepare_name(run: str) -> str:
    """Return the name of prepare's Job and of its ConfigMap."""
    return f"{run}-prepare"


def server_name(run: str) -> str:
    """Return the name of the StatefulSet of the run's rollout servers, of its Service and of its ConfigMap."""
    return f"{run}-server"


def server_ordinal(run: str, *, name: str) -> int | None:
    """Return the ordinal of that pod among those of the run's rollout servers, or None for any other pod."""
    match = _SERVER_POD.match(name)
    return int(match["ordinal"]) if match and match["servers"] == server_name(run) else None


def server_key_name(run: str, *, uid: str) -> str:
    """Return the name of the Secret with the servers' key: nobody else's, as the operator may not look at it."""
    return f"{run}-server-{hashlib.sha256(uid.encode()).hexdigest()[:8]}"


def server_addresses(run: str, servers: RolloutServers, *, port: int) -> tuple[str, ...]:
    """Return the address of each rollout server, by its first node's pod in the headless Service."""
    name = server_name(run)
    return tuple(f"http://{name}-{first}.{name}:{port}" for first in range(0, servers.pods, servers.nodes_per_replica))


def sandbox_name(run: str) -> str:
    """Return the name of everything that the run's sandbox consists of, and its host name."""
    return f"{run}-sandbox"


def attempt_name(run: str, *, attempt: int) -> str:
    """Return the name of an attempt's PyTorchJob and of its ConfigMap."""
    return f"{run}-a{attempt}"


def attempt_of(run: str, *, name: str) -> int | None:
    """Return the attempt that a child of that name belongs to, or None for any other child."""
    match = _ATTEMPT.match(name)
    return int(match["attempt"]) if match and match["run"] == run else None


def pod_name(run: str, *, attempt: int, node: int) -> str:
    """Return the name that the training operator gives to the pod of a node of the gang."""
    job = attempt_name(run, attempt=attempt)
    return f"{job}-master-0" if node == 0 else f"{job}-worker-{node - 1}"


def resource_path(*, namespace: str, run: str) -> str:
    """Return the path of the run on the progress server; the token's audience is the same text."""
    return f"apis/{GROUP}/v1alpha1/namespaces/{namespace}/trainingruns/{run}"


def parse_resource_path(path: str) -> tuple[str, str] | None:
    """Return the namespace and the run that a path of `resource_path` names, or None for any other."""
    match = _RESOURCE_PATH.fullmatch(path)
    return (match["namespace"], match["run"]) if match else None
