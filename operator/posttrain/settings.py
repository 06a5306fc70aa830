"""The platform's settings: images, profiles, prices, the progress server. One typed file.

It owns what a platform team decides once for all runs; it must not hold anything of a single run.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from posttrain.errors import UserError


class SettingsModel(BaseModel):
    """A frozen part of the settings file (camelCase, unknown keys refused)."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class Toleration(SettingsModel):
    """A toleration, as in a pod spec."""

    key: str | None = None
    """The taint's key; without one every taint is tolerated."""
    operator: str = "Equal"
    """Equal, or Exists for whatever value."""
    value: str | None = None
    """The taint's value."""
    effect: str | None = None
    """NoSchedule, PreferNoSchedule or NoExecute; without one each of them."""


class Profile(SettingsModel):
    """One kind of node, as the platform team describes it."""

    node_selector: dict[str, str] = {}
    """Labels of the nodes that training pods run on."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes."""
    scheduler_name: str | None = None
    """The scheduler that places the pods."""
    runtime_class_name: str | None = None
    """The RuntimeClass of the pods."""
    gpu_resource: str = "nvidia.com/gpu"
    """The resource name under which the device plugin offers GPUs."""
    gpu_name: str | None = None
    """The GPU's model, as prepare's messages name it."""
    gpu_memory: str | None = None
    """Memory of one GPU as a Kubernetes quantity; prepare's estimate is checked against it."""
    devices: dict[str, str] = {}
    """Further devices that each pod asks for, as in {rdma/ib: "8"}."""
    cpu: str = "8"
    """CPUs of a pod whose run does not say."""
    memory: str = "64Gi"
    """Memory of a pod whose run does not say."""
    shared_memory: str | None = None
    """Size of /dev/shm of a pod whose run does not say, part of its memory; without one all of it."""
    topology_key: str | None = None
    """A node label; pods of one run are placed, where possible, on nodes with the same value."""
    env: dict[str, str] = {}
    """Environment of training pods, as in {NCCL_IB_HCA: mlx5}."""
    price_per_gpu_hour: str | None = None
    """What an hour of one GPU costs, as a decimal in quotes; a run's status counts its cost with it."""
    allow_ipc_lock: bool = False
    """Whether training pods get the capability IPC_LOCK, which RDMA needs to pin memory."""


class Images(SettingsModel):
    """The images of the containers, by tag or digest."""

    trainer: str = "ghcr.io/posttrain/trainer:0.1.0"
    """What prepares and trains; a run keeps the one that it began with."""
    vllm: str = "ghcr.io/posttrain/vllm:0.1.0"
    """The same for runs whose completions come from vLLM."""
    sandbox: str = "ghcr.io/posttrain/sandbox:0.1.0"
    """What runs programs out of completions; a run keeps the one that it began with."""


class SandboxSettings(SettingsModel):
    """Where sandboxes run, which carry out programs that nobody has read."""

    node_selector: dict[str, str] = {}
    """Labels of the nodes that sandboxes run on, as of nodes that are for nothing else."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints of those nodes."""
    runtime_class_name: str | None = None
    """The RuntimeClass of sandboxes, as of one with virtual machines; its kernel must have Landlock."""


class ProgressServerSettings(SettingsModel):
    """Where the workloads report to."""

    url: str = "https://posttrain-progress.posttrain-system.svc:8443"
    """The progress server as pods reach it; its certificate is for this host."""
    ca_config_map: str = "posttrain-progress-ca"
    """ConfigMap with the key `ca.crt`, in every namespace that runs are allowed in."""


class OperatorSettings(SettingsModel):
    """How the operator's process works."""

    workers: int = Field(default=16, ge=1, le=256)
    """Runs that are looked at at the same time."""
    resync_seconds: int = Field(default=600, ge=1)
    """After which everything is listed and looked at anew, whatever the watches said."""
    lease_name: str = "posttrain-operator"
    """The Lease by which one replica leads."""


class Settings(SettingsModel):
    """All settings; the defaults describe a cluster with one kind of GPU node."""

    images: Images = Images()
    """The images of the pods."""
    profiles: dict[str, Profile] = Field(default_factory=lambda: {"default": Profile()})
    """The kinds of nodes, by the name that runs choose them by in spec.resources.profile."""
    default_profile: str = "default"
    """The profile of a run that names none."""
    sandbox: SandboxSettings = SandboxSettings()
    """Where programs out of completions run."""
    progress_server: ProgressServerSettings = ProgressServerSettings()
    """Where pods report to."""
    operator: OperatorSettings = OperatorSettings()
    """How the operator works."""
    allow_file_sources: bool = False
    """file:// sources and code.path: true on one machine only."""
    queues: bool = True
    """Whether queueName is obeyed: false on one machine only, which has no queues."""
    enforces_network_policies: bool = True
    """Whether the cluster's network enforces NetworkPolicies, which alone keep others from a run's rollout servers."""
    open_rollout_servers: bool = False
    """Whether runs may have rollout servers although nobody is kept from them."""
    prepare_cpu: str = "2"
    """CPUs of prepare's pod, which holds no GPU."""
    prepare_memory: str = "16Gi"
    """Memory of prepare's pod."""
    termination_grace_seconds: int = 120
    """How long a training pod may write a last checkpoint when it is told to end."""
    prepare_backoff_limit: int = 2
    """How often prepare is tried again before the run fails."""

    @model_validator(mode="after")
    def _default_exists(self) -> Settings:
        if self.default_profile not in self.profiles:
            raise ValueError(f"defaultProfile {self.default_profile!r} is not among the profiles")
        return self


def load_settings(file: Path) -> Settings:
    """Return the settings in a YAML file.

    Raises:
        UserError: it cannot be read, or something in it is not a setting; with every problem.
    """
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {os.strerror(error.errno or 0)}: name a file with settings") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: is not YAML: {error}") from None
    try:
        return Settings.model_validate(data or {})
    except ValidationError as error:
        problems = (f"{file}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError("\n".join(problems)) from None
