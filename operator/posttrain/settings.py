"""The platform's settings: images, profiles, prices, the progress server. One typed file.

It owns what a platform team decides once for all runs; it must not hold anything of a single run.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel


class SettingsModel(BaseModel):
    """A frozen part of the settings file (camelCase, unknown keys refused)."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, extra="forbid", frozen=True)


class Toleration(SettingsModel):
    """A toleration, as in a pod spec."""

    key: str | None = None
    operator: str = "Equal"
    value: str | None = None
    effect: str | None = None


class Profile(SettingsModel):
    """One kind of node, as the platform team describes it."""

    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    scheduler_name: str | None = None
    runtime_class_name: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    gpu_name: str | None = None
    gpu_memory: str | None = None
    """Memory of one GPU as a Kubernetes quantity; prepare's estimate is checked against it."""
    devices: dict[str, str] = {}
    cpu: str = "8"
    memory: str = "64Gi"
    shared_memory: str | None = None
    topology_key: str | None = None
    env: dict[str, str] = {}
    price_per_gpu_hour: str | None = None
    allow_ipc_lock: bool = False


class Images(SettingsModel):
    """The images of the containers, by tag or digest."""

    trainer: str = "ghcr.io/posttrain/trainer:0.1.0"


class ProgressServerSettings(SettingsModel):
    """Where the workloads report to."""

    url: str = "https://posttrain-progress.posttrain-system.svc:8443"
    ca_config_map: str = "posttrain-progress-ca"
    """ConfigMap with the key `ca.crt`, in every namespace that runs are allowed in."""


class Settings(SettingsModel):
    """All settings; the defaults describe a cluster with one kind of GPU node."""

    images: Images = Images()
    profiles: dict[str, Profile] = Field(default_factory=lambda: {"default": Profile()})
    default_profile: str = "default"
    progress_server: ProgressServerSettings = ProgressServerSettings()
    allow_file_sources: bool = False
    """file:// sources and code.path: true on one machine only."""
    queues: bool = True
    """Whether queueName is obeyed: false on one machine only, which has no queues."""
    prepare_cpu: str = "2"
    prepare_memory: str = "16Gi"
    termination_grace_seconds: int = 120
    prepare_backoff_limit: int = 2

    @model_validator(mode="after")
    def _default_exists(self) -> Settings:
        if self.default_profile not in self.profiles:
            raise ValueError(f"defaultProfile {self.default_profile!r} is not among the profiles")
        return self
