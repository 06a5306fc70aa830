"""Everything a decision looks at: the run, what is observed of it, and the time, in one frozen value.

It owns what follows from these without deciding anything; it must not decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from posttrain.api.methods import coerce_spec
from posttrain.api.training_run import TrainingRun, TrainingRunSpec
from posttrain.api.training_run_status import Progress, ProvenanceStatus, TrainingRunStatus
from posttrain.contract.config import ResolvedSource, config_hash
from posttrain.errors import Problem
from posttrain.plan import labels, names, sources
from posttrain.plan.attempts import Gang
from posttrain.plan.checks import find_spec_problems
from posttrain.plan.kueue import Ask, WorkloadState, parse_workload, workload_ref
from posttrain.plan.manifests import is_live, is_of_attempt, pods_of_role
from posttrain.plan.objects import code_files
from posttrain.plan.pytorchjob import job_ref, parse_job_state
from posttrain.plan.references import RunState, parse_run_state
from posttrain.plan.rollout_servers import count_ready, find_servers, servers_config_ref, servers_ref
from posttrain.plan.types import Manifest, ObjectRef, Observed
from posttrain.settings import Profile, Settings

CONFIG_MAP = "v1", "ConfigMap"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A run at one moment. `status` is the one written last, with the facts of this moment carried into it."""

    run: TrainingRun
    status: TrainingRunStatus
    observed: Observed
    now: datetime
    settings: Settings

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.metadata.name

    @property
    def attempt(self) -> int:
        """The current attempt; 0 before the first."""
        return self.status.attempt or 0

    @property
    def progress(self) -> Progress | None:
        """What the workload told, of whatever attempt."""
        return self.run.status.progress

    @property
    def attempt_progress(self) -> Progress | None:
        """What the workload told of the current attempt."""
        progress = self.progress
        return progress if progress is not None and progress.attempt == self.attempt else None

    # --- The spec ---

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with the spec."""
        return tuple(find_spec_problems(self.run.spec, settings=self.settings))

    @cached_property
    def spec(self) -> TrainingRunSpec:
        """The spec with its `args` coerced. Only where `problems` is empty."""
        return coerce_spec(self.run.spec)

    @cached_property
    def config_hash(self) -> str:
        """The hash that the spec is accepted with. Only where `problems` is empty."""
        return config_hash(self.spec)

    @property
    def provenance(self) -> ProvenanceStatus:
        """What is pinned so far."""
        return self.status.provenance or ProvenanceStatus()

    @cached_property
    def profile(self) -> Profile:
        """The profile: as pinned, else (or where the spec has another one since) as the settings have it now.

        A spec that names none of the settings' is refused: until it is mended, what is pinned stays.
        """
        pinned, name = self.provenance, self.run.spec.resources.profile
        known = self.settings.profiles.get(name or self.settings.default_profile)
        if pinned.profile is not None and (pinned.profile_name == name or known is None):
            return Profile.model_validate(pinned.profile)
        return self.settings.profiles[name or self.settings.default_profile]

    @property
    def image(self) -> str:
        """The image of the run's pods: as pinned, else the user's, else the settings'."""
        pinned = (self.provenance.image_digests or {}).get("trainer")
        overrides, images = self.run.spec.pod_overrides, self.settings.images
        own = images.vllm if self.run.spec.image_name == "vllm" else images.trainer
        return pinned or (overrides.image if overrides else None) or own

    @property
    def sandbox_image(self) -> str:
        """The image of the run's sandbox: as pinned, else the settings'."""
        pinned = (self.provenance.image_digests or {}).get("sandbox")
        return pinned or self.settings.images.sandbox

    @cached_property
    def referenced_run(self) -> RunState | None:
        """The run whose model this one starts from, as far as it is there."""
        reference = self.run.spec.model.run_ref
        manifest = self.observed.runs.get(reference.name) if reference is not None else None
        return parse_run_state(manifest) if manifest is not None else None

    @property
    def model_source(self) -> str | None:
        """Where the model lies: as the spec says, as pinned, or as the run says that made it; None while unknown."""
        made = self.referenced_run
        return self.run.spec.model.source or self.provenance.model_source or (made.model_uri if made else None)

    @cached_property
    def sources(self) -> Mapping[str, ResolvedSource]:
        """Every source, each Hub revision as a commit once that is known."""
        provenance = self.provenance
        commits = dict(provenance.dataset_commits or {})
        if provenance.model_commit is not None:
            commits["model"] = provenance.model_commit
        return sources.resolve_all(self.run.spec, commits=commits, model_source=self.model_source)

    @cached_property
    def code(self) -> Mapping[str, str] | None:
        """The files of the run's own code: of its snapshot, else of what the spec refers to; None while not there."""
        snapshot = self.observed.objects.get(ObjectRef(*CONFIG_MAP, names.code_name(self.name)))
        if snapshot is not None:
            return code_files(snapshot.get("data") or {})
        code = self.run.spec.code
        found = self.observed.config_maps.get(code.config_map_name or code.path or "") if code else None
        return code_files(found) if found is not None else None

    # --- What is observed ---

    @cached_property
    def job(self) -> Manifest | None:
        """The PyTorchJob of the current attempt."""
        return self.observed.objects.get(job_ref(self.name, attempt=self.attempt))

    @property
    def attempt_config(self) -> Manifest | None:
        """The ConfigMap of the current attempt."""
        return self.observed.objects.get(ObjectRef(*CONFIG_MAP, names.attempt_name(self.name, attempt=self.attempt)))

    @cached_property
    def trainer_pods(self) -> tuple[Manifest, ...]:
        """The pods of all attempts' gangs."""
        return pods_of_role(self.observed.pods, labels.ROLE_TRAINER)

    @cached_property
    def live_trainer_pods(self) -> tuple[Manifest, ...]:
        """Those that may still run, hence hold GPUs and write to the storage."""
        return tuple(pod for pod in self.trainer_pods if is_live(pod, now=self.now))

    @cached_property
    def server_pods(self) -> tuple[Manifest, ...]:
        """The pods of the rollout servers."""
        return find_servers(self.run, self.observed.pods)

    @cached_property
    def live_server_pods(self) -> tuple[Manifest, ...]:
        """Those that may still run, hence hold GPUs."""
        return tuple(pod for pod in self.server_pods if is_live(pod, now=self.now))

    @property
    def servers_ready(self) -> bool:
        """Whether every rollout server answers that the run is to have; also without any."""
        servers = self.run.spec.rollout_servers
        return servers is None or count_ready(self.run, self.server_pods) >= servers.replicas

    @cached_property
    def gang(self) -> Gang:
        """The current attempt's gang."""
        progress = self.attempt_progress
        resources = self.run.spec.resources
        return Gang(
            run=self.name,
            attempt=self.attempt,
            size=resources.num_nodes,
            ranks_per_node=resources.ranks_per_node,
            job=parse_job_state(self.job) if self.job is not None else None,
            pods=tuple(pod for pod in self.trainer_pods if is_of_attempt(pod, self.attempt)),
            departed=tuple(pod for pod in self.observed.departed if is_of_attempt(pod, self.attempt)),
            hash_when_running=self.status.gang_hash,
            first_error=progress.first_error if progress else None,
            result=progress.result if progress else None,
        )

    @property
    def ask(self) -> Ask | None:
        """What the run asks its queue for; None without a queue, and where there are none."""
        resources = self.run.spec.resources
        if resources.queue_name is None or not self.settings.queues:
            return None
        servers = self.run.spec.rollout_servers
        pods = resources.num_nodes + (servers.pods if servers is not None else 0)
        return Ask(queue=resources.queue_name, pods=pods, profile=resources.profile or "")

    @cached_property
    def workload(self) -> WorkloadState | None:
        """The Workload that asks for the run's quota."""
        manifest = self.observed.objects.get(workload_ref(self.name))
        return parse_workload(manifest) if manifest is not None else None

    @property
    def has_quota(self) -> bool:
        """Whether a gang may be there: it needs no quota, or has just what it needs."""
        workload, ask = self.workload, self.ask
        return workload is None if ask is None else workload is not None and workload.admitted and workload.ask == ask

    @property
    def awaits_quota(self) -> bool:
        """Whether nothing of an attempt may be made yet, for want of quota."""
        return not self.was_created and not self.has_quota

    @cached_property
    def holds_gang(self) -> bool:
        """Whether anything of a gang is there that runs, or from which pods may still be made."""
        pending = self.gang.job is not None and self.gang.job.phase == "Pending"
        old = any(ref.kind == "PyTorchJob" for ref in self.old_children)
        return bool(self.live_trainer_pods) or pending or old or self.holds_servers

    @property
    def holds_servers(self) -> bool:
        """Whether a rollout server is there, or may still be made."""
        made = servers_ref(self.name), servers_config_ref(self.name)
        return any(ref in self.observed.objects for ref in made) or bool(self.live_server_pods)

    @property
    def was_created(self) -> bool:
        """Whether the current attempt's job exists or has been seen."""
        return self.job is not None or self.status.attempt_created_time is not None

    @property
    def is_begun(self) -> bool:
        """Whether a job may still be made from the current attempt's ConfigMap: only that is there so far."""
        return self.attempt_config is not None and not self.was_created

    @cached_property
    def old_children(self) -> tuple[ObjectRef, ...]:
        """Jobs and ConfigMaps of ended attempts."""
        found = []
        for ref in self.observed.objects:
            attempt = names.attempt_of(self.name, name=ref.name)
            if attempt is not None and attempt < self.attempt and ref.kind in ("PyTorchJob", "ConfigMap"):
                found.append(ref)
        return tuple(sorted(found, key=lambda ref: (ref.kind != "PyTorchJob", ref.name)))
