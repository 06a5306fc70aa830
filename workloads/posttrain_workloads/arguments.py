"""From an attempt's config to TRL's SFTConfig or GRPOConfig: the user's keys, and those that posttrain sets itself.

It owns which value each owned key gets; it must not import torch except where the real class is built, so that prepare
and the tests read the same values from plain dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.contract import environment
from posttrain.contract.config import TrainingConfig
from posttrain.contract.result import ExitCode
from posttrain_workloads import _compat
from posttrain_workloads.runtime import RankFailure

if TYPE_CHECKING:
    from trl import GRPOConfig, SFTConfig

CHECKPOINT_STEPS_MAX = 500
SERVER_SECONDS = 3600.0
COLLECTIVE_SECONDS = 7200
"""The other ranks wait in a collective while rank 0 waits for a server, hands weights over and gets completions."""
_TRACKERS = {"WandB": "wandb", "Trackio": "trackio", "MLflow": "mlflow", "TensorBoard": "tensorboard"}


def owned_args(config: TrainingConfig, *, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys that posttrain sets itself; a user's value for one of them was refused long ago."""
    spec = config.spec
    on_cpu = config.gang.gpus_per_node == 0
    owned: dict[str, Any] = {
        "output_dir": environ[environment.STORAGE],
        "save_strategy": "steps",
        # Without everySteps the interval follows from the run's length, which the trainer knows when it begins.
        "save_steps": spec.checkpoints.every_steps or CHECKPOINT_STEPS_MAX,
        "save_total_limit": None,  # transformers' rotation runs before any marker could be written
        "load_best_model_at_end": False,
        "logging_nan_inf_filter": False,
        "report_to": [_TRACKERS[name] for name in spec.tracking.report_to] or "none",
        "ddp_backend": "gloo" if on_cpu else "nccl",
        # With use_cpu accelerate takes the ranks for plain CPU processes and leaves DeepSpeed out.
        "use_cpu": on_cpu and not uses_deepspeed(config),
        "trust_remote_code": spec.model.trust_remote_code,
    }
    if config.method == "sft" and spec.model.eos_token is not None:
        owned["eos_token"] = spec.model.eos_token  # GRPO takes the tokenizer's
    if spec.grpo is not None:
        mode = spec.grpo.rollout.mode
        owned |= {
            "reward_weights": [float(reward.weight) for reward in spec.grpo.rewards],
            "use_vllm": mode != "Transformers",
            **({"vllm_mode": mode.lower()} if mode != "Transformers" else {}),
        }
        if mode == "Server":
            # A server that was restarted loads its model again, however large it is, before it joins.
            owned |= {"vllm_server_timeout": SERVER_SECONDS}
            if environment.ROLLOUT_SERVERS in environ:  # not where prepare builds the same arguments
                owned["vllm_server_base_url"] = environ[environment.ROLLOUT_SERVERS]
    if spec.tracking.project is not None:
        owned["project"] = spec.tracking.project
    return owned


def training_args(config: TrainingConfig, *, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return every key that TRL's class gets: platform defaults, over them the user's, over those the owned."""
    defaults: dict[str, Any] = {"disable_tqdm": True, "run_name": config.run.name}
    if config.gang.gpus_per_node == 0:
        # TRL turns bf16 on wherever it is unset; on a CPU that is slower and less exact.
        defaults |= {"bf16": False, "dataloader_pin_memory": False}
    if config.spec.rollout_servers is not None:
        defaults["ddp_timeout"] = COLLECTIVE_SECONDS
    return {**defaults, **config.args, **owned_args(config, environ=environ)}


def make_args(config: TrainingConfig, values: Mapping[str, Any], *, ranks: int | None = None) -> SFTConfig | GRPOConfig:
    """Return TRL's own arguments of the method, with these values; it raises what TRL and transformers raise.

    `ranks` is how many there will be, where this process is none of them.
    """
    from trl import GRPOConfig, SFTConfig

    args_class: type[SFTConfig] | type[GRPOConfig] = SFTConfig if config.method == "sft" else GRPOConfig
    if ranks is not None:
        args_class = _compat.plan_ranks(args_class, ranks)
    return args_class(**_compat.name_args(values, args_class))


def build_args(config: TrainingConfig, *, environ: Mapping[str, str]) -> SFTConfig | GRPOConfig:
    """Build TRL's own arguments, which sets up this rank's device and, under torchrun, its process group.

    Raises:
        RankFailure: TRL or transformers refuse a value.
    """
    try:
        return make_args(config, training_args(config, environ=environ))
    except (ValueError, TypeError) as error:
        raise RankFailure("ConfigInvalid", f"spec.{config.method}.args: {error}", exit_code=ExitCode.INVALID) from error


def tracker_environment(config: TrainingConfig, *, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that experiment trackers read their project, team, group and folder from."""
    tracking = config.spec.tracking
    values = {
        "WANDB_PROJECT": tracking.project,
        "WANDB_ENTITY": tracking.entity,
        "WANDB_RUN_GROUP": tracking.group,
        "MLFLOW_EXPERIMENT_NAME": tracking.project,
        "TENSORBOARD_LOGGING_DIR": f"{environ[environment.STORAGE]}/tensorboard",
    }
    return {name: value for name, value in values.items() if value is not None}


def uses_deepspeed(config: TrainingConfig) -> bool:
    """Tell whether the strategy is one of DeepSpeed's."""
    return config.spec.parallelism.strategy in {"ZeRO1", "ZeRO2", "ZeRO3"}


def checkpoint_steps(config: TrainingConfig, *, max_steps: int) -> int:
    """Return the steps between checkpoints: as the spec says, else a tenth of the run (rounded up), at most 500."""
    return config.spec.checkpoints.every_steps or min(-(-max_steps // 10), CHECKPOINT_STEPS_MAX)
