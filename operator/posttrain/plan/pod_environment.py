"""The environment variables of a run's pods.

It owns which variables a workload finds, and which names a user may not set; it must not build the rest of a pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.api.servers import RolloutServers
from posttrain.contract import environment
from posttrain.plan import names, sources
from posttrain.plan.deepspeed import STAGES
from posttrain.plan.fsdp import build_fsdp_environment
from posttrain.plan.objects import CONFIG_FILE, DEEPSPEED_FILE
from posttrain.plan.pod_inputs import (
    ACCESS_FOLDER,
    CLAIMS_FOLDER,
    CODE_FOLDER,
    CONFIG_FOLDER,
    FILES_FOLDER,
    RUNTIME_FOLDER,
    SERVER_KEY,
    SERVER_NODES_PORT,
    SERVER_PORT,
    STORAGE_FOLDER,
    TERMINATION_FILE,
    PodInputs,
)
from posttrain.plan.quantities import parse_quantity

_RESERVED_ENV_PREFIXES = ("POSTTRAIN_", "KUBEFLOW_TRAINER_", "PET_", "ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_")
_RESERVED_ENV = frozenset(
    {
        "DISABLE_KUBEFLOW_INTEGRATION",
        "GROUP_RANK",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "RANK",
        "TOKENIZERS_PARALLELISM",
        "VLLM_API_KEY",
        "VLLM_SERVER_DEV_MODE",
        "WORLD_SIZE",
    }
)


def is_reserved_variable(name: str) -> bool:
    """Return whether the platform sets the environment variable, so that a user may not."""
    return name in _RESERVED_ENV or name.startswith(_RESERVED_ENV_PREFIXES)


def trainer_environment(inputs: PodInputs) -> list[dict[str, Any]]:
    """Return the variables of a node of the gang."""
    return [*_gang_env(inputs), *_common_env(inputs), *_user_env(inputs)]


def server_environment(inputs: PodInputs, servers: RolloutServers, *, cpu: str) -> list[dict[str, Any]]:
    """Return the variables of a node of a rollout server with so many CPUs."""
    threads = _threads(cpu, ranks=inputs.run.spec.server_ranks_per_node)
    values = {**inputs.profile.env, "OMP_NUM_THREADS": str(threads)}
    meeting = names.server_addresses(inputs.run.metadata.name, servers, port=SERVER_NODES_PORT)
    return [
        *_given(inputs, values),
        *_common_env(inputs, reports=False),
        _variable(environment.LISTEN, f"0.0.0.0:{SERVER_PORT}"),
        *([_variable(environment.SERVER_NODES, ",".join(meeting))] if servers.nodes_per_replica > 1 else ()),
        _server_key(inputs),
        *_user_env(inputs),
    ]


def prepare_environment(inputs: PodInputs, *, cpu: str) -> list[dict[str, Any]]:
    """Return the variables of prepare, which none of the user's touches."""
    return [_variable("OMP_NUM_THREADS", str(_threads(cpu, ranks=1))), *_common_env(inputs)]


def secret_environment(inputs: PodInputs) -> list[dict[str, Any]]:
    """Return the Secrets whose keys become variables of the pods that compute."""
    overrides, tracking = inputs.run.spec.pod_overrides, inputs.run.spec.tracking
    secrets = list(overrides.env_from_secrets or ()) if overrides else []
    if tracking.secret_ref and tracking.secret_ref not in secrets:
        secrets.append(tracking.secret_ref)
    return [{"secretRef": {"name": name}} for name in secrets]


# --- Pieces -----------------------------------------------------------------------------------------------------------


def _variable(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _secret(name: str, *, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _threads(cpu: str, *, ranks: int) -> int:
    return max(int(parse_quantity(cpu) / ranks), 1)


def _common_env(inputs: PodInputs, *, reports: bool = True) -> list[dict[str, Any]]:
    """Return the variables of every pod: paths, the Hub, and whom it reports to; what only serves scores nothing."""
    access = inputs.run.spec.access
    env = [
        _variable(environment.CONFIG, f"{CONFIG_FOLDER}/{CONFIG_FILE}"),
        _variable(environment.STORAGE, STORAGE_FOLDER),
        _variable(environment.RUNTIME, RUNTIME_FOLDER),
        _variable(environment.TERMINATION, TERMINATION_FILE),
        *(_report_env(inputs) if reports else ()),
        _field(environment.POD_NAME, "metadata.name"),
        _field(environment.NODE_NAME, "spec.nodeName"),
    ]
    for read in sources.read_claims(inputs.sources):
        mount = sources.claim_mount(read)
        env.append(_variable(environment.mount_variable(mount), f"{CLAIMS_FOLDER}/{read}"))
    if sources.reads_files(inputs.sources):
        env.append(_variable(environment.mount_variable(sources.FILES_MOUNT), FILES_FOLDER))
    if inputs.code is not None:
        env += [_variable(environment.CODE, CODE_FOLDER), _variable("PYTHONPATH", CODE_FOLDER)]
    # TRL tells the Hub of every trainer that is built; a platform's runs are nobody else's business.
    env += [_variable("HF_HOME", f"{STORAGE_FOLDER}/hf-home"), _variable("HF_HUB_DISABLE_TELEMETRY", "1")]
    if inputs.sandbox_urls and reports:
        env.append(_variable(environment.SANDBOX_URLS, ",".join(inputs.sandbox_urls)))
    if not sources.uses_hub(inputs.sources):
        env.append(_variable("HF_HUB_OFFLINE", "1"))
    if access.hub_endpoint:
        env.append(_variable("HF_ENDPOINT", access.hub_endpoint))
    if access.hub_token_secret_ref:
        token = access.hub_token_secret_ref
        env.append(_secret("HF_TOKEN", secret=token.name, key=token.key))
    sandbox = inputs.run.spec.used_sandbox if reports else None  # rollout servers reward nothing
    if sandbox is not None and sandbox.api_key_secret_ref is not None:
        api_key = sandbox.api_key_secret_ref
        env.append(_secret(environment.SANDBOX_KEY, secret=api_key.name, key=api_key.key))
    return [*env, _variable("PYTHONUNBUFFERED", "1"), _variable("TOKENIZERS_PARALLELISM", "false")]


def _report_env(inputs: PodInputs) -> list[dict[str, Any]]:
    run = inputs.run
    path = names.resource_path(namespace=run.metadata.namespace, run=run.metadata.name)
    url = f"{inputs.settings.progress_server.url.rstrip('/')}/{path}"
    return [
        _variable(environment.FACTS_URL, f"{url}/facts"),
        _variable(environment.STATUS_URL, f"{url}/status"),
        _variable(environment.TOKEN, f"{ACCESS_FOLDER}/token"),
        _variable(environment.CA_CERT, f"{ACCESS_FOLDER}/ca.crt"),
    ]


def _gang_env(inputs: PodInputs) -> list[dict[str, Any]]:
    """Return what only the gang needs: the strategy, threads, the profile's and the trackers' variables."""
    spec = inputs.run.spec
    values = dict(inputs.profile.env)
    values["OMP_NUM_THREADS"] = str(_threads(inputs.trainer_cpu, ranks=spec.resources.ranks_per_node))
    if spec.parallelism.strategy in STAGES:
        values["ACCELERATE_USE_DEEPSPEED"] = "true"
        values["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{CONFIG_FOLDER}/{DEEPSPEED_FILE}"
    elif spec.parallelism.strategy == "FSDP":
        values |= build_fsdp_environment(spec.parallelism)
    values |= _tracking_env(inputs)
    given = _given(inputs, values)
    servers = spec.rollout_servers
    if servers is None:
        return given
    addresses = names.server_addresses(inputs.run.metadata.name, servers, port=SERVER_PORT)
    return [*given, _variable(environment.ROLLOUT_SERVERS, ",".join(addresses)), _server_key(inputs)]


def _given(inputs: PodInputs, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return variables by name, without those that the user sets."""
    own = {variable.name for variable in _overridden(inputs)}
    return [_variable(name, value) for name, value in sorted(values.items()) if name not in own]


def _server_key(inputs: PodInputs) -> dict[str, Any]:
    metadata = inputs.run.metadata
    secret = names.server_key_name(metadata.name, uid=metadata.uid or "")
    return _secret(environment.ROLLOUT_KEY, secret=secret, key=SERVER_KEY)


def _tracking_env(inputs: PodInputs) -> dict[str, str]:
    tracking = inputs.run.spec.tracking
    values: dict[str, str] = {}
    if "WandB" in tracking.report_to:
        named = {
            "WANDB_PROJECT": tracking.project,
            "WANDB_ENTITY": tracking.entity,
            "WANDB_RUN_GROUP": tracking.group,
        }
        values |= {name: value for name, value in named.items() if value is not None}
    if "MLflow" in tracking.report_to and tracking.project is not None:
        values["MLFLOW_EXPERIMENT_NAME"] = tracking.project
    if "TensorBoard" in tracking.report_to:
        values["TENSORBOARD_LOGGING_DIR"] = f"{STORAGE_FOLDER}/tensorboard"
    return values


def _overridden(inputs: PodInputs) -> tuple[Any, ...]:
    overrides = inputs.run.spec.pod_overrides
    return overrides.env or () if overrides else ()


def _user_env(inputs: PodInputs) -> list[dict[str, Any]]:
    return [_variable(variable.name, variable.value) for variable in _overridden(inputs)]
