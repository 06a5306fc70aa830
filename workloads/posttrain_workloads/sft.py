"""One rank of supervised fine-tuning with TRL's SFTTrainer; torchrun starts it, launch starts torchrun.

    python -m posttrain_workloads.launch sft

It owns the order of a rank's life, from its config to the marked model folder; it must not parse any option, and it
imports torch only after its config is read.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.contract import environment
from posttrain.contract.checkpoints import MODEL_FOLDER, Marker
from posttrain.contract.config import HubSource, TrainingConfig
from posttrain.contract.facts import CheckpointSaved, PhaseChanged
from posttrain.contract.result import ExitCode, Result
from posttrain_workloads import _compat
from posttrain_workloads.arguments import build_sft_config, tracker_environment, uses_deepspeed
from posttrain_workloads.checkpoints import CheckpointKeeper, Found, newest_verified
from posttrain_workloads.failures import explain_failure
from posttrain_workloads.reporting import Reporter, open_reporter
from posttrain_workloads.runtime import RankError, RankFailure, Runtime, die_with_parent
from posttrain_workloads.storage import storage_uri

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "posttrain")


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


def main() -> None:
    """Train; on failure leave the error file and the exit code that launch judges by."""
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
            reporter = open_reporter(environ=os.environ, attempt=config.attempt, source="rank-0")
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
        failure = explain_failure(error)
        runtime.write_error(failure, rank=rank)
        if reporter is not None:
            reporter.close()
        sys.stderr.flush()
        # Not sys.exit: the process groups' and the data loaders' own clean-up may wait for ranks that are gone.
        os._exit(failure.exit_code)
    if reporter is not None:
        reporter.close()


def train(rank: Rank) -> None:
    """Train from the newest verified checkpoint, or from the start, to the marked model folder."""
    config, environ = rank.config, rank.environ
    import torch.distributed as dist
    from transformers import set_seed

    from posttrain_workloads.callback import AlreadyTrained, ContractCallback, LossWatch, watch_losses
    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.model import build_peft_config, load_model, load_tokenizer
    from posttrain_workloads.owncode import build_callbacks, load_trainer_class

    args = build_sft_config(config, environ=environ)
    assert_world_size(config)  # before anything is written: two gangs of one would both be rank 0 of one storage
    set_seed(args.seed)
    callbacks, trainer_class = build_callbacks(config), load_trainer_class(config)
    found = choose_checkpoint(rank)

    with args.main_process_first(desc="fetching and mixing the data"):
        mixture = load_mixture(config, environ=environ)
    tokenizer = load_tokenizer(config, environ=environ)
    model = load_model(config, environ=environ)

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
            model=model,
            args=args,
            train_dataset=mixture.train,
            eval_dataset=mixture.test,
            processing_class=tokenizer,
            peft_config=build_peft_config(config),
            callbacks=[*callbacks, contract],
        )
    except (ValueError, TypeError) as error:
        raise RankFailure("ConfigInvalid", f"the trainer refuses: {error}", exit_code=ExitCode.INVALID) from error
    contract.trainer = trainer
    _compat.post_progress_in_background(trainer)
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


# --- After the last step ---------------------------------------------------------------------------------------------


def report_checkpoint(rank: Rank, folder: Path, marker: Marker) -> None:
    """Send word of a checkpoint that is complete."""
    size = sum(file.bytes for file in marker.files)
    logging.info("checkpoint of step %s is complete: %.0f MB", marker.step, size / 1e6)
    if rank.reporter is not None:
        uri = storage_uri(rank.config, folder.name)
        rank.reporter.send(CheckpointSaved(step=marker.step, uri=uri, bytes=size, digest=marker.digest))


def end_early(rank: Rank, *, step: int) -> None:
    """Leave word that we were told to stop, and where the next attempt goes on."""
    failure = RankFailure(
        "Terminated", f"told to stop: a checkpoint was saved at step {step}", exit_code=ExitCode.TERMINATED
    )
    rank.runtime.write_error(failure, rank=rank.rank)


def finish(rank: Rank, *, trainer: Any, tokenizer: Any, keeper: CheckpointKeeper) -> None:
    """Evaluate, save the model with its tokenizer, mark the folder, and leave the result for launch."""
    step = trainer.state.global_step
    evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    if trainer.eval_dataset is not None and step not in evaluated:
        trainer.evaluate()
    if rank.reporter is not None:
        rank.reporter.beat(phase="saving", step=step)
        rank.reporter.send(PhaseChanged(phase="saving", step=step))
    save_model(rank, trainer=trainer, tokenizer=tokenizer)
    trainer.save_state()
    if rank.rank == 0:
        keeper.mark_model(rank.storage / MODEL_FOLDER, step=step)
        rank.runtime.write_result(build_result(rank.config, trainer))


def save_model(rank: Rank, *, trainer: Any, tokenizer: Any) -> None:
    """Save the whole model, whatever the strategy has sharded, ready to generate."""
    import torch.distributed as dist

    folder = rank.storage / MODEL_FOLDER
    if rank.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that ended before its marker
    if dist.is_initialized():
        dist.barrier()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if rank.config.spec.peft is None:
        # What was trained to end a turn must also end a generation; and the cache was off for training only.
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.config.use_cache = True
    elif isinstance(rank.config.model, HubSource):
        for adapter in model.peft_config.values():  # it was loaded from a cache that only this storage has
            adapter.base_model_name_or_path = rank.config.model.repo
            adapter.revision = rank.config.model.revision
    trainer.save_model(str(folder))


def build_result(config: TrainingConfig, trainer: Any) -> Result:
    """Return the result of a run that went through, with its metrics from the trainer's own log."""
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last |= entry
    metrics = {"steps": str(trainer.state.global_step)}
    for name, source in (
        ("train_loss", "train_loss"),
        ("loss", "loss"),
        ("eval_loss", "eval_loss"),
        ("tokens", "num_tokens"),
        ("runtime_seconds", "train_runtime"),
        ("samples_per_second", "train_samples_per_second"),
    ):
        if source in last:
            metrics[name] = str(last[source])
    return Result(
        reason="Completed",
        message=f"{trainer.state.global_step} steps are done, and the model is saved",
        metrics=metrics,
        artifacts={
            "model": storage_uri(config, MODEL_FOLDER),
            "trainer_state": storage_uri(config, "trainer_state.json"),
        },
    )


def _write_into_pipe(runtime: Runtime, *, local_rank: int) -> None:
    """Write all output, native code's too, into the pipe from which launch reads what this rank says."""
    pipe = runtime.log_pipe(local_rank)
    if not pipe.exists():
        return
    descriptor = os.open(pipe, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main()
