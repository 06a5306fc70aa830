"""What the pods of an attempt are made from, and where in them a workload finds things.

It owns the folders of a pod; it must not build anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract.config import ResolvedSource
from posttrain.settings import Profile, Settings

CONFIG_FOLDER = "/etc/posttrain"
STORAGE_FOLDER = "/mnt/storage"
CLAIMS_FOLDER = "/mnt/claims"
FILES_FOLDER = "/mnt/files"
CODE_FOLDER = "/code"
RUNTIME_FOLDER = "/run/posttrain"
ACCESS_FOLDER = "/var/run/posttrain"
SHARED_MEMORY_FOLDER = "/dev/shm"
TERMINATION_FILE = "/dev/termination-log"

SERVER_PORT = 8000
SERVER_NODES_PORT = 8001
SERVER_KEY = "key"
"""In the Secret that the rollout servers and the gang read."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a queue asks of the pods that use the quota reserved in it: where they run, and how they are marked."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PodInputs:
    """Everything that the pods of one attempt are made from."""

    run: TrainingRun
    settings: Settings
    profile: Profile
    image: str
    attempt: int
    config: str
    """Name of the ConfigMap with its config.json."""
    sources: Mapping[str, ResolvedSource]
    code: list[dict[str, str]] | None
    """`items` of the code volume (empty: whatever the ConfigMap holds); None without own code."""
    avoided_nodes: tuple[str, ...] = ()
    assignment: Assignment = Assignment()
    sandbox_urls: tuple[str, ...] = ()
    """Where programs out of completions run."""

    @property
    def trainer_cpu(self) -> str:
        """CPUs of a node of the gang."""
        return self.run.spec.resources.cpu or self.profile.cpu

    @property
    def trainer_memory(self) -> str:
        """Memory of a node of the gang."""
        return self.run.spec.resources.memory or self.profile.memory
