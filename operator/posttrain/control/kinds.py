"""The kinds that the operator asks the API server for, with their place in its URLs.

It owns that table; it must not know what the objects contain.
"""

from __future__ import annotations

from posttrain.api.base import API_VERSION
from posttrain.api.training_run import KIND, PLURAL
from posttrain.plan.kueue import API_VERSION as KUEUE

Kind = tuple[str, str]
"""apiVersion and kind."""

TRAINING_RUN: Kind = (API_VERSION, KIND)
POD: Kind = ("v1", "Pod")
CONFIG_MAP: Kind = ("v1", "ConfigMap")
SERVICE_ACCOUNT: Kind = ("v1", "ServiceAccount")
CLAIM: Kind = ("v1", "PersistentVolumeClaim")
SECRET: Kind = ("v1", "Secret")
SERVICE: Kind = ("v1", "Service")
EVENT: Kind = ("v1", "Event")
DEPLOYMENT: Kind = ("apps/v1", "Deployment")
STATEFUL_SET: Kind = ("apps/v1", "StatefulSet")
NETWORK_POLICY: Kind = ("networking.k8s.io/v1", "NetworkPolicy")
JOB: Kind = ("batch/v1", "Job")
PYTORCHJOB: Kind = ("kubeflow.org/v1", "PyTorchJob")
WORKLOAD: Kind = (KUEUE, "Workload")
RESOURCE_FLAVOR: Kind = (KUEUE, "ResourceFlavor")
WORKLOAD_PRIORITY_CLASS: Kind = (KUEUE, "WorkloadPriorityClass")
LEASE: Kind = ("coordination.k8s.io/v1", "Lease")
TOKEN_REVIEW: Kind = ("authentication.k8s.io/v1", "TokenReview")

PLURALS: dict[Kind, str] = {
    TRAINING_RUN: PLURAL,
    POD: "pods",
    CONFIG_MAP: "configmaps",
    SERVICE_ACCOUNT: "serviceaccounts",
    CLAIM: "persistentvolumeclaims",
    SECRET: "secrets",
    SERVICE: "services",
    EVENT: "events",
    DEPLOYMENT: "deployments",
    STATEFUL_SET: "statefulsets",
    NETWORK_POLICY: "networkpolicies",
    JOB: "jobs",
    PYTORCHJOB: "pytorchjobs",
    WORKLOAD: "workloads",
    RESOURCE_FLAVOR: "resourceflavors",
    WORKLOAD_PRIORITY_CLASS: "workloadpriorityclasses",
    LEASE: "leases",
    TOKEN_REVIEW: "tokenreviews",
}

CHILDREN: tuple[Kind, ...] = (
    PYTORCHJOB,
    JOB,
    DEPLOYMENT,
    STATEFUL_SET,
    POD,
    CONFIG_MAP,
    SERVICE_ACCOUNT,
    CLAIM,
    SERVICE,
    NETWORK_POLICY,
    WORKLOAD,
)
"""What plans create, and the pods of it: watched by the label that all of them carry. Kueue need not be installed.

But for a Secret, which is created and never looked at.
"""


def resource_path(kind: Kind, *, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """Return the path of a kind, or of an object of it, on the API server.

    Raises:
        KeyError: the kind is not in the table.
    """
    api_version = kind[0]
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    parts = [root, f"namespaces/{namespace}" if namespace else "", PLURALS[kind], name, subresource]
    return "/".join(part for part in parts if part)
