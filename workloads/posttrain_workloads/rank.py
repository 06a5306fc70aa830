"""The life of one rank, whatever it trains: its config, the trainer it builds, the checkpoint it goes on from.

It owns the order of things from the environment to the last step; it must not know how SFT and GRPO differ, and it
imports torch only after its config is read.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.contract import environment
from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import PhaseChanged
from posttrain.contract.result import ExitCode
from posttrain_workloads import _compat
from posttrain_workloads.arguments import tracker_environment, uses_deepspeed
from posttrain_workloads.checkpoints import CheckpointKeeper, Found, newest_verified
from posttrain_workloads.endings import end_early, finish, report_checkpoint
from posttrain_workloads.failures import explain_failure
from posttrain_workloads.reporting import Reporter, open_reporter
from posttrain_workloads.runtime import RankError, RankFailure, Runtime, die_with_parent, end_rank

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "vllm", "posttrain")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank is told by its config and its environment."""

    config: TrainingConfig
    environ: Mapping[str, str]
    storage: Path
    runtime: Runtime
    rank: int
    local_rank: int
    reporter: Reporter | None
    """Rank 0's alone."""


def run_rank(train: Callable[[Rank], None]) -> None:
    """Be a rank that trains by `train`; on failure leave the error file and the exit code that launch judges by."""
    die_with_parent()
    runtime = Runtime.of(os.environ)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    _write_into_pipe(runtime, local_rank=local_rank)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(levelname)s %(message)s")
    reporter: Reporter | None = None
    try:
        config = TrainingConfig.from_json(Path(os.environ[environment.CONFIG]).read_text())
        if config.gang.gpus_per_node == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a container without a GPU may still see the node's
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals
        os.environ.update(tracker_environment(config, environ=os.environ))
        if rank == 0:
            reporter = open_reporter(config, environ=os.environ, source="rank-0")
            reporter.beat(phase="loading")
            reporter.send(PhaseChanged(phase="loading"))
        train(
            Rank(
                config=config,
                environ=os.environ,
                storage=Path(os.environ[environment.STORAGE]),
                runtime=runtime,
                rank=rank,
                local_rank=local_rank,
                reporter=reporter,
            )
        )
    except BaseException as error:
        traceback.print_exc()
        end_rank(explain_failure(error), environ=os.environ, first=reporter.close if reporter is not None else None)
    if reporter is not None:
        reporter.close()


def train_to_the_end(
    rank: Rank, *, found: Found, tokenizer: Any, trainer_class: Any, callbacks: Sequence[Any], **arguments: Any
) -> None:
    """Build the trainer, train from the checkpoint that was found, and save the model, or what a stop leaves.

    `arguments` are the trainer's own, but for the tokenizer and its callbacks.

    Raises:
        RankFailure: the trainer refuses its arguments, or does not spread the work as planned.
    """
    import torch.distributed as dist

    from posttrain_workloads.callback import AlreadyTrained, ContractCallback, LossWatch, watch_losses

    config = rank.config
    keeper = CheckpointKeeper(
        rank.storage,
        rank=rank.rank,
        world_size=config.gang.world_size,
        strategy=config.spec.parallelism.strategy,
        config_hash=config.config_hash,
        keep_last=config.spec.checkpoints.keep_last,
        on_marked=lambda folder, marker: report_checkpoint(rank, folder, marker),
    )
    watch = LossWatch()
    contract = ContractCallback(
        config,
        storage=rank.storage,
        runtime=rank.runtime,
        reporter=rank.reporter,
        keeper=keeper,
        watch=watch,
        rank=rank.rank,
        local_rank=rank.local_rank,
        resumed_from=found.path,
        versions=versions(),
    )
    try:
        trainer = watch_losses(trainer_class, watch)(
            processing_class=tokenizer, callbacks=[*callbacks, contract], **arguments
        )
    except (ValueError, TypeError) as error:
        raise RankFailure("ConfigInvalid", f"the trainer refuses: {error}", exit_code=ExitCode.INVALID) from error
    contract.trainer = trainer
    _compat.post_progress_in_background(trainer)
    _compat.load_to_numbered_cpus()
    assert_gang(config, trainer)

    try:
        trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)
    except AlreadyTrained:
        logging.info("every step was done before: only the end is left")
    keeper.wait()
    if contract.stopped:
        end_early(rank, step=trainer.state.global_step)
    else:
        finish(rank, trainer=trainer, tokenizer=tokenizer, keeper=keeper)
    if dist.is_initialized():
        dist.barrier()  # rank 0's marker is written before any rank ends
        dist.destroy_process_group()


# --- Before the first step -------------------------------------------------------------------------------------------


def assert_world_size(config: TrainingConfig) -> None:
    """See that as many ranks met as were planned.

    Raises:
        RankFailure: fewer or more did; training on would look like a success.
    """
    import torch.distributed as dist

    met = dist.get_world_size() if dist.is_initialized() else 1
    if met != config.gang.world_size:
        raise RankFailure(
            "WorldSizeMismatch",
            f"{config.gang.world_size} ranks are planned ({config.gang.num_nodes} nodes with "
            f"{config.gang.processes_per_node} each), and {met} met",
            exit_code=ExitCode.INVALID,
        )


def assert_gang(config: TrainingConfig, trainer: Any) -> None:
    """See that the trainer really spreads the work as planned, now that it is built.

    Raises:
        RankFailure: it runs on other ranks, or with another strategy.
    """
    assert_world_size(config)
    accelerator = trainer.accelerator
    if accelerator.num_processes != config.gang.world_size:
        raise RankFailure(
            "WorldSizeMismatch",
            f"the trainer counts {accelerator.num_processes} processes, where {config.gang.world_size} are planned",
            exit_code=ExitCode.INVALID,
        )
    strategy = config.spec.parallelism.strategy
    runs = accelerator.distributed_type.value
    if uses_deepspeed(config):
        stage = accelerator.state.deepspeed_plugin.zero_stage if runs == "DEEPSPEED" else None
        right = stage == int(strategy.removeprefix("ZeRO"))
        runs = f"{runs} stage {stage}" if stage is not None else runs
    elif strategy == "FSDP":
        right = runs == "FSDP"
    else:
        right = runs in {"NO", "MULTI_CPU", "MULTI_GPU"}
    if not right:
        raise RankFailure(
            "StrategyMismatch", f"the trainer runs as {runs}, where {strategy} is planned", exit_code=ExitCode.INVALID
        )


def choose_checkpoint(rank: Rank) -> Found:
    """Return the checkpoint that all ranks go on from: rank 0 verifies and tidies up, the others are told.

    Raises:
        RankFailure: on every rank, if there is one that must not be passed over in silence.
    """
    import torch.distributed as dist

    decision: list[Found | RankError | None] = [None]
    if rank.rank == 0:
        try:
            decision[0] = newest_verified(
                rank.storage,
                world_size=rank.config.gang.world_size,
                strategy=rank.config.spec.parallelism.strategy,
            )
        except RankFailure as failure:
            decision[0] = RankError.of(failure, rank=rank.rank)
    if dist.is_initialized():
        dist.broadcast_object_list(decision)
    found = decision[0]
    if isinstance(found, RankError):
        raise RankFailure(found.reason, found.message, exit_code=ExitCode(found.exit_code), advice=found.advice)
    assert found is not None
    if rank.reporter is not None:
        for skipped in found.skipped:
            logging.warning("checkpoint of step %s passed over: %s", skipped.step, skipped.reason)
            rank.reporter.send(skipped)
    return found


def versions() -> dict[str, str]:
    """Return the versions of what trains."""
    known = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for package in _PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def _write_into_pipe(runtime: Runtime, *, local_rank: int) -> None:
    """Write all output, native code's too, into the pipe from which launch reads what this rank says."""
    pipe = runtime.log_pipe(local_rank)
    if not pipe.exists():
        return
    descriptor = os.open(pipe, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
