"""Which objects a run consists of at each point: the ones of the run, of prepare, of one attempt.

It owns the sets and their order; it must not decide when they are wanted. Of an attempt whose spec is refused nothing
is built: what it asks for cannot be read.
"""

from __future__ import annotations

import json

from posttrain.contract.config import GangShape, RunIdentity, TrainingConfig
from posttrain.plan import names
from posttrain.plan.deepspeed import STAGES, build_deepspeed_config
from posttrain.plan.kueue import (
    POD_SET,
    SERVER_POD_SET,
    Ask,
    build_assignment,
    build_workload,
    missing_flavors,
    workload_ref,
)
from posttrain.plan.manifests import is_being_deleted
from posttrain.plan.objects import (
    JOB_FILE,
    build_claim,
    build_code_config_map,
    build_config_map,
    build_network_policy,
    build_service_account,
    code_items,
)
from posttrain.plan.pod_inputs import Assignment, PodInputs
from posttrain.plan.prepare_job import build_prepare_job, prepare_ref
from posttrain.plan.pytorchjob import build_pytorchjob, job_ref
from posttrain.plan.quantities import parse_quantity
from posttrain.plan.rollout_servers import (
    build_key_secret,
    build_service,
    build_stateful_set,
    servers_config_ref,
    servers_ref,
)
from posttrain.plan.sandbox import build_sandbox, sandbox_ref, sandbox_urls
from posttrain.plan.situation import CONFIG_MAP, Situation
from posttrain.plan.types import Manifest, ObjectRef

CLAIM = "v1", "PersistentVolumeClaim"


def run_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return what a run has from its acceptance to its end, in apply order."""
    if situation.problems:
        return ()
    run = situation.run
    children = []
    if run.spec.access.service_account_name is None:
        children.append(build_service_account(run))
    if run.spec.checkpoints.storage.claim_name is None:
        children.append(build_claim(run, size=_claim_size(situation)))
    children.append(build_network_policy(run))
    if situation.code is not None:
        children.append(build_code_config_map(run, files=situation.code))
    return tuple(children)


def prepare_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return prepare's ConfigMap and Job."""
    attempt = names.PREPARE_ATTEMPT
    config_map = build_config_map(
        situation.run,
        name=names.prepare_name(situation.name),
        config=_config(situation, attempt=attempt),
    )
    inputs = _pod_inputs(situation, attempt=attempt, config=names.prepare_name(situation.name))
    return config_map, build_prepare_job(inputs)


def prepare_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the references to prepare's Job and ConfigMap."""
    return prepare_ref(situation.name), ObjectRef(*CONFIG_MAP, names.prepare_name(situation.name))


def attempt_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return the ConfigMap and the PyTorchJob of the current attempt: of one that is begun the job, as that keeps it.

    Other settings than those it was begun with are for the next attempt.
    """
    if situation.problems:
        return ()
    return _kept_job(situation) if situation.is_begun else _render_attempt(situation)


def outdated_configs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the references to the ConfigMaps of a job, and of servers, that are refused and would be others by now.

    No pod has read them: the next are made with what the settings say since.
    """
    if situation.problems:
        return ()
    rejected = situation.observed.rejected
    outdated = []
    config = situation.attempt_config
    if config is not None and situation.is_begun and job_ref(situation.name, attempt=situation.attempt) in rejected:
        _, job = _render_attempt(situation)
        outdated += [] if _kept_job(situation) == (job,) else [ObjectRef.of(config)]
    config, made = situation.observed.objects.get(servers_config_ref(situation.name)), servers_ref(situation.name)
    there = made in situation.observed.objects or situation.live_server_pods  # what is refused then is a repair
    if config is not None and made in rejected and not there and not _lacks_flavors(situation):
        _, servers = _render_servers(situation)
        outdated += [] if json.loads(config["data"][JOB_FILE]) == servers else [ObjectRef.of(config)]
    return tuple(outdated)


def _render_attempt(situation: Situation) -> tuple[Manifest, Manifest]:
    spec, attempt = situation.spec, situation.attempt
    zero = spec.parallelism.strategy in STAGES
    config_name = names.attempt_name(situation.name, attempt=attempt)
    inputs = _pod_inputs(situation, attempt=attempt, config=config_name, pod_set=POD_SET)
    job = build_pytorchjob(inputs)
    config_map = build_config_map(
        situation.run,
        name=config_name,
        config=_config(situation, attempt=attempt),
        deepspeed=build_deepspeed_config(spec.parallelism) if zero else None,
        job=job,
    )
    return config_map, job


def service_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return what a gang waits for until it serves: the run's sandbox and its rollout servers."""
    if situation.problems:
        return ()
    return *_sandbox_children(situation), *_server_children(situation)


def service_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the references to what of them goes when no gang is to be there: what holds nothing stays."""
    return sandbox_ref(situation.name), *_server_refs(situation)


def waiting_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the references to what goes while an attempt may not have its gang: what serves one, and how it was begun.

    The next reservation may be in other flavors, hence on other nodes, and of a spec that was changed meanwhile.
    """
    config = situation.attempt_config
    begun = (ObjectRef.of(config),) if config is not None and situation.is_begun else ()
    return *begun, *service_refs(situation)


def _sandbox_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return what the run's sandbox consists of; its Deployment only where it is not there: it is never re-rendered."""
    made = sandbox_ref(situation.name)
    parts = _sandbox_parts(situation)
    return tuple(part for part in parts if ObjectRef.of(part) != made or made not in situation.observed.objects)


def _sandbox_parts(situation: Situation) -> tuple[Manifest, ...]:
    sandbox = situation.run.spec.own_sandbox
    if sandbox is None:
        return ()
    return build_sandbox(situation.run, sandbox, image=situation.sandbox_image, settings=situation.settings)


def frozen_job(situation: Situation) -> tuple[Manifest, ...]:
    """Return the current attempt's job as it was made; empty where it is not there, or what it was is not known."""
    if situation.job is None or is_being_deleted(situation.job):
        return ()
    return _kept_job(situation)


def _kept_job(situation: Situation) -> tuple[Manifest, ...]:
    """Return the job in the attempt's ConfigMap; none where that is about to go, or was not made by an operator."""
    config = situation.attempt_config
    text = (config.get("data") or {}).get(JOB_FILE) if config is not None and not is_being_deleted(config) else None
    return (json.loads(text),) if text is not None else ()


def build_run_workload(situation: Situation, *, ask: Ask) -> Manifest:
    """Return the Workload that asks for the current attempt's quota.

    A priority that Kueue has taken over from the class is kept: it follows the class from then on.
    """
    workload, wanted = situation.workload, situation.run.spec.resources.workload_priority_class
    priority = situation.observed.priorities.get(wanted) if wanted is not None else None
    if workload is not None and workload.priority_class == wanted and workload.priority is not None:
        priority = workload.priority
    inputs = _pod_inputs(situation, attempt=situation.attempt, config="")
    return build_workload(inputs, ask=ask, priority_class=wanted, priority=priority)


def _server_children(situation: Situation) -> tuple[Manifest, ...]:
    """Return the rollout servers with all that they need, for the quota that the run has now; none in other modes.

    Servers that are there stay as they were made. Their key is made with them, once.
    """
    run = situation.run
    if run.spec.rollout_servers is None:
        return ()
    observed = situation.observed.objects.get(servers_ref(situation.name))
    kept = situation.observed.objects.get(servers_config_ref(situation.name))
    secret = build_key_secret(run, key=situation.observed.server_key)
    if any(there is not None and is_being_deleted(there) for there in (observed, kept)):
        return ()  # the next are made when their names are free
    if kept is not None:
        servers = json.loads(kept["data"][JOB_FILE])
        return (build_service(run), servers) if observed is not None else (build_service(run), secret, servers)
    if observed is not None or situation.live_server_pods or _lacks_flavors(situation):
        return ()
    return build_service(run), secret, *_render_servers(situation)


def _render_servers(situation: Situation) -> tuple[Manifest, Manifest]:
    name = names.server_name(situation.name)
    inputs = _pod_inputs(situation, attempt=situation.attempt, config=name, pod_set=SERVER_POD_SET)
    servers = build_stateful_set(inputs)
    config = _config(situation, attempt=situation.attempt)
    return build_config_map(situation.run, name=name, config=config, job=servers), servers


def _server_refs(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the references to what goes with the servers' end: what keeps their address and their key stays."""
    return servers_ref(situation.name), servers_config_ref(situation.name)


def _assignment(situation: Situation, *, pod_set: str) -> Assignment:
    if situation.workload is None or _lacks_flavors(situation):
        return Assignment()
    return build_assignment(situation.workload, situation.observed.flavors, pod_set=pod_set)


def _lacks_flavors(situation: Situation) -> bool:
    """Return whether it is not known yet what the quota asks of pods."""
    workload = situation.workload
    return workload is not None and bool(missing_flavors(workload, situation.observed.flavors))


def child_refs(situation: Situation) -> frozenset[ObjectRef]:
    """Return the references to every child that the run has now or next."""
    attempt = max(situation.attempt, 1)
    refs = {ObjectRef.of(child) for child in run_children(situation)}
    refs |= {*prepare_refs(situation), job_ref(situation.name, attempt=attempt)}
    refs.add(ObjectRef(*CONFIG_MAP, names.attempt_name(situation.name, attempt=attempt)))
    refs |= {ObjectRef.of(part) for part in _sandbox_parts(situation)}
    if situation.ask is not None:
        refs.add(workload_ref(situation.name))
    if situation.run.spec.rollout_servers is not None:
        refs |= {*_server_refs(situation), ObjectRef.of(build_service(situation.run))}
    return frozenset(refs)


def _claim_size(situation: Situation) -> str:
    """Return the size of the claim made for the run: a claim that somebody enlarged cannot shrink again."""
    size = situation.run.spec.checkpoints.storage.size or ""
    claim = situation.observed.objects.get(ObjectRef(*CLAIM, names.claim_name(situation.name)))
    spec = (claim or {}).get("spec") or {}
    there = ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    return there if there is not None and parse_quantity(there) > parse_quantity(size) else size


def _pod_inputs(situation: Situation, *, attempt: int, config: str, pod_set: str | None = None) -> PodInputs:
    restarts = situation.status.restarts
    files = situation.code
    return PodInputs(
        run=situation.run,
        settings=situation.settings,
        profile=situation.profile,
        image=situation.image,
        attempt=attempt,
        config=config,
        sources=situation.sources,
        code=code_items(files or {}) if situation.run.spec.code is not None else None,
        avoided_nodes=tuple(restarts.avoided_nodes or ()) if restarts else (),
        assignment=_assignment(situation, pod_set=pod_set) if pod_set is not None else Assignment(),
        sandbox_urls=sandbox_urls(situation.run),
    )


def _config(situation: Situation, *, attempt: int) -> TrainingConfig:
    run, spec, profile = situation.run, situation.spec, situation.profile
    resources = spec.resources
    memory = profile.gpu_memory if resources.gpus_per_node else None
    return TrainingConfig(
        run=RunIdentity(kind=run.kind, namespace=run.metadata.namespace, name=situation.name, uid=run.metadata.uid),
        attempt=attempt,
        method=spec.method,
        config_hash=situation.config_hash,
        spec=spec,
        args=spec.training.args,
        model=situation.sources["model"],
        datasets=tuple(situation.sources[f"datasets/{i}"] for i in range(len(spec.datasets))),
        eval_datasets=tuple(situation.sources[f"evalDatasets/{i}"] for i in range(len(spec.eval_datasets))),
        gang=GangShape(
            num_nodes=resources.num_nodes,
            processes_per_node=resources.ranks_per_node,
            gpus_per_node=resources.gpus_per_node,
        ),
        gpu_memory_bytes=int(parse_quantity(memory)) if memory is not None else None,
        gpu_name=profile.gpu_name if resources.gpus_per_node else None,
    )
