"""What a rank leaves: word of a checkpoint, of an early end, or the marked model folder and its result.

It owns what is saved after the last step and told of it; it must not import torch before it is asked to save.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.contract.checkpoints import MODEL_FOLDER, Marker
from posttrain.contract.config import HubSource, TrainingConfig
from posttrain.contract.facts import CheckpointSaved, PhaseChanged
from posttrain.contract.result import ExitCode, Result
from posttrain_workloads.checkpoints import CheckpointKeeper
from posttrain_workloads.runtime import RankFailure
from posttrain_workloads.storage import storage_uri

if TYPE_CHECKING:
    from posttrain_workloads.rank import Rank


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
