"""What is wrong with a spec beyond its schema: everything that the settings and the tables of libraries tell.

It owns the problems and their wording; it must not look at anything observed.
"""

from __future__ import annotations

from decimal import Decimal

from posttrain.api.grpo_checks import find_grpo_problems
from posttrain.api.loader import format_path
from posttrain.api.methods import args_path, find_args_problems
from posttrain.api.training_run import TrainingRunSpec
from posttrain.errors import Problem
from posttrain.plan.deepspeed import STAGES, find_deepspeed_problems
from posttrain.plan.fsdp import find_fsdp_problems
from posttrain.plan.labels import RESERVED_PREFIXES
from posttrain.plan.pod_environment import is_reserved_variable
from posttrain.plan.sources import find_source_problems
from posttrain.settings import Settings


def find_spec_problems(spec: TrainingRunSpec, *, settings: Settings) -> list[Problem]:
    """Return every problem of a spec that its schema lets through, each with its path and what to change."""
    return [
        *_args(spec),
        *find_source_problems(spec, allow_files=settings.allow_file_sources),
        *_parallelism(spec),
        *_peft(spec),
        *_precision(spec),
        *_profile(spec, settings),
        *_code(spec, settings),
        *_pod_overrides(spec),
    ]


def _args(spec: TrainingRunSpec) -> list[Problem]:
    found = find_args_problems(spec.to_data()) or find_grpo_problems(spec)
    return [Problem(path=format_path(path), message=message) for path, message in found]


def _parallelism(spec: TrainingRunSpec) -> list[Problem]:
    parallelism = spec.parallelism
    if parallelism.strategy in STAGES:
        return find_deepspeed_problems(parallelism, args=".".join(args_path(spec.method)))
    if parallelism.strategy == "FSDP":
        return find_fsdp_problems(parallelism)
    if parallelism.config:
        message = (
            f"strategy {parallelism.strategy} has no configuration: leave it out, or take ZeRO1, ZeRO2, ZeRO3, FSDP"
        )
        return [Problem(path="spec.parallelism.config", message=message)]
    return []


def _peft(spec: TrainingRunSpec) -> list[Problem]:
    if spec.peft is None or Decimal(spec.peft.dropout) < 1:
        return []
    message = f'"{spec.peft.dropout}" drops everything: write a share below 1, as in "0.05"'
    return [Problem(path="spec.peft.dropout", message=message)]


def _precision(spec: TrainingRunSpec) -> list[Problem]:
    if spec.resources.gpus_per_node or not spec.training.args.get("fp16"):
        return []
    message = "fp16 is for GPUs: leave it out to train in float32 on CPUs, or write bf16: true"
    return [Problem(path=f"{'.'.join(args_path(spec.method))}.fp16", message=message)]


def _profile(spec: TrainingRunSpec, settings: Settings) -> list[Problem]:
    profile = spec.resources.profile
    if profile is None or profile in settings.profiles:
        return []
    message = f"there is no profile {profile!r} here: take one of {', '.join(sorted(settings.profiles))}"
    return [Problem(path="spec.resources.profile", message=message)]


def _code(spec: TrainingRunSpec, settings: Settings) -> list[Problem]:
    if spec.code is None or spec.code.path is None or settings.allow_file_sources:
        return []
    message = (
        "a folder means this machine, which only a local run has (`posttrain run`): make a ConfigMap of it "
        "(kubectl create configmap NAME --from-file=FOLDER) and name it in spec.code.configMapName"
    )
    return [Problem(path="spec.code.path", message=message)]


def _pod_overrides(spec: TrainingRunSpec) -> list[Problem]:
    overrides = spec.pod_overrides
    if overrides is None:
        return []
    problems = []
    for i, variable in enumerate(overrides.env or ()):
        if is_reserved_variable(variable.name):
            message = f"{variable.name} is set by posttrain: choose another name"
            problems.append(Problem(path=f"spec.podOverrides.env[{i}].name", message=message))
    for key in overrides.labels or {}:
        if key.startswith(RESERVED_PREFIXES):
            message = "is a label by which posttrain, Kubeflow or Kueue finds its pods: choose another key"
            problems.append(Problem(path=f"spec.podOverrides.labels.{key}", message=message))
    return problems
