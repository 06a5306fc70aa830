"""The names of the environment variables through which every path and address reaches a workload.

It owns the names and how a mounted path is resolved; it must not read the real environment by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CONFIG = "POSTTRAIN_CONFIG"
"""File: the attempt's config.json."""
STORAGE = "POSTTRAIN_STORAGE"
"""Folder: the run's storage (checkpoints, model, facts)."""
CODE = "POSTTRAIN_CODE"
"""Folder: own code; unset without any."""
TERMINATION = "POSTTRAIN_TERMINATION"
"""File: the termination message, written by launch alone."""
RUNTIME = "POSTTRAIN_RUNTIME"
"""Folder, private to the pod and empty at its start: error files, the stop request."""
FACTS_URL = "POSTTRAIN_FACTS_URL"
"""Address that facts are posted to."""
SANDBOX_URLS = "POSTTRAIN_SANDBOX_URLS"
"""Addresses of the sandboxes that run programs out of completions, with commas between; unset without any."""
SANDBOX_KEY = "POSTTRAIN_SANDBOX_KEY"
"""The key to the service whose machines run programs out of completions; unset without one."""
LISTEN = "POSTTRAIN_LISTEN"
"""`host:port`: where a container that serves is to listen; unset in any other."""
ROLLOUT_SERVERS = "POSTTRAIN_ROLLOUT_SERVERS"
"""Addresses of the run's rollout servers, with commas between; unset without any."""
SERVER_NODES = "POSTTRAIN_SERVER_NODES"
"""Addresses, with commas between, at each of which the nodes of one rollout server meet: its first node's; unset where
each server is one pod."""
ROLLOUT_KEY = "VLLM_API_KEY"
"""The key that the rollout servers ask for: vLLM's own variable, which its servers and our client read."""
POD_NAME = "POSTTRAIN_POD_NAME"
NODE_NAME = "POSTTRAIN_NODE_NAME"

STATUS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
"""Address that transformers' KubeflowCallback posts progress to."""
CA_CERT = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""File: the authority that the progress server's certificate is checked against."""
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"
"""File: the bearer token of both."""

_MOUNT_PREFIX = "POSTTRAIN_MOUNT_"


def mount_variable(mount: str) -> str:
    """Return the variable that holds the folder of a named mount: `claim-data` -> `POSTTRAIN_MOUNT_CLAIM_DATA`."""
    return _MOUNT_PREFIX + mount.upper().replace("-", "_").replace(".", "_")


def resolve_mounted(mount: str, path: str, *, environ: Mapping[str, str]) -> Path:
    """Return the real path of `path` inside the named mount.

    Raises:
        KeyError: the mount's variable is not set.
        ValueError: the path leaves the mount.
    """
    root = Path(environ[mount_variable(mount)])
    target = Path(*root.parts, *Path(path).parts)
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} leaves the mount {mount!r}")
    return target
