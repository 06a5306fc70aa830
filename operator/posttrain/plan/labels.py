"""Every label that posttrain puts on an object, each with its reason.

It owns the keys and the sets of labels; it must not know the objects that carry them.
"""

from __future__ import annotations

PREFIX = "posttrain.dev/"
"""Users may not set labels under it, nor under Kubeflow's."""

RUN = "posttrain.dev/run"
"""The run's name. The network policy selects its peers by it; a retained claim is found by it when the run is gone."""

ATTEMPT = "posttrain.dev/attempt"
"""The attempt a pod or ConfigMap belongs to (prepare: 0): a late pod of an ended attempt is told from a new one."""

PROFILE = "posttrain.dev/profile"
"""The profile whose resources a Workload asks for (empty: the default one): another one is asked for anew."""

ROLE = "posttrain.dev/role"
"""What a pod does: prepare, trainer, sandbox or server."""

MANAGED_BY = "app.kubernetes.io/managed-by"
"""The recommended label by which tools group what an operator made."""

MANAGER = "posttrain"

ROLE_PREPARE = "prepare"
ROLE_SERVER = "server"
ROLE_TRAINER = "trainer"
ROLE_SANDBOX = "sandbox"

RESERVED_PREFIXES = (
    PREFIX,
    "training.kubeflow.org/",
    "kubeflow.org/",
    "kueue.x-k8s.io/",
    "app.kubernetes.io/managed-by",
)
"""Label keys that pod overrides may not touch: somebody selects pods by them."""


def run_labels(run: str) -> dict[str, str]:
    """Return the labels of everything that belongs to a run."""
    return {MANAGED_BY: MANAGER, RUN: run}


def attempt_labels(run: str, *, attempt: int) -> dict[str, str]:
    """Return the labels of everything that belongs to one attempt."""
    return {**run_labels(run), ATTEMPT: str(attempt)}


def pod_labels(run: str, *, attempt: int, role: str) -> dict[str, str]:
    """Return the labels of a pod."""
    return {**attempt_labels(run, attempt=attempt), ROLE: role}
