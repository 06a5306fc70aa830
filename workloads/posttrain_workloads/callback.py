"""The callback that ties transformers' trainer to the contract: beats, facts, checkpoints, the stop request.

It owns what happens at which of the trainer's events. It is the one module that imports transformers at its top, so
nothing that must stay free of torch may import it.
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event, by position

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.contract.checkpoints import checkpoint_folder
from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import Logged, NonFinite, PhaseChanged, Started
from posttrain_workloads import _compat
from posttrain_workloads.arguments import checkpoint_steps
from posttrain_workloads.checkpoints import CheckpointKeeper
from posttrain_workloads.reporting import Reporter
from posttrain_workloads.runtime import RankFailure, Runtime

logger = logging.getLogger(__name__)

_NEVER_NON_FINITE = ("loss", "grad_norm", "eval_loss")


class AlreadyTrained(Exception):
    """The checkpoint that was resumed from is of the last step.

    Without this transformers 5.23 takes one step more where the last step is not the end of an epoch: it asks whether
    to stop only after a step (trainer.py:1959).
    """


class LossWatch:
    """Notes on the device, without waiting for it, whether a loss was not finite."""

    def __init__(self) -> None:
        self._bad: torch.Tensor | None = None

    def see(self, loss: torch.Tensor) -> None:
        """Take the loss of one micro-batch."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def take(self) -> torch.Tensor | bool:
        """Return whether one was not finite since the last call."""
        bad, self._bad = self._bad, None
        return False if bad is None else bad


def watch_losses(trainer_class: Any, watch: LossWatch) -> Any:
    """Return the trainer class with every training loss shown to the watch."""

    class WatchedTrainer(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            watch.see(loss)
            return loss

    WatchedTrainer.__name__ = trainer_class.__name__
    return WatchedTrainer


class ContractCallback(TrainerCallback):  # type: ignore[misc]
    """Follows one rank's trainer; the last of its callbacks, so that what others add to a checkpoint is marked too."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        storage: Path,
        runtime: Runtime,
        reporter: Reporter | None,
        keeper: CheckpointKeeper,
        watch: LossWatch,
        rank: int,
        local_rank: int,
        resumed_from: Path | None,
        versions: dict[str, str],
    ) -> None:
        self._config = config
        self._storage = storage
        self._runtime = runtime
        self._reporter = reporter
        self._keeper = keeper
        self._watch = watch
        self._rank = rank
        self._local_rank = local_rank
        self._resumed_from = resumed_from
        self._versions = versions
        self._evaluating = False
        self._met_non_finite = False
        self.trainer: Any = None
        """Set once it is built: it is built with its callbacks."""
        self.stopped = False
        """The ranks agreed to stop, saved a checkpoint and ended before the last step."""

    # --- Begin -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # From here on, because a resumed state brings the interval that it was saved with.
        state.save_steps = checkpoint_steps(self._config, max_steps=state.max_steps)
        if self._resumed_from is not None:
            _compat.restore_logging_state(self.trainer, self._resumed_from, rank=self._rank, method=self._config.method)
        self._tell(
            Started(
                world_size=args.world_size,
                max_steps=state.max_steps,
                resumed_from_step=state.global_step,
                versions=self._versions,
            )
        )
        self._enter("training", step=state.global_step)
        if state.global_step >= state.max_steps:
            raise AlreadyTrained
        if self._local_rank == 0:
            self._runtime.mark_training()

    # --- Steps -------------------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._beat()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._beat(step=state.global_step)
        if self._local_rank == 0:
            self._runtime.write_last_step(state.global_step)
        self._keeper.check()
        stop, not_finite = self._agree(self._runtime.stop_requested(), self._watch.take(), device=args.device)
        if not_finite:
            self._meet_non_finite("loss", step=state.global_step)
        if stop and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:
            control.should_evaluate = False  # asked for by eval_strategy "epoch", though the epoch was left half-way

    def _agree(self, stop: bool, not_finite: torch.Tensor | bool, *, device: torch.device) -> tuple[bool, bool]:
        """Return whether any rank says so; one small collective a step, so that all ranks leave at the same one."""
        flags = torch.zeros(2, device=device)
        flags[0] = stop
        flags[1] = not_finite
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        agreed_stop, agreed_not_finite = flags.tolist()
        return bool(agreed_stop), bool(agreed_not_finite)

    # --- Numbers -----------------------------------------------------------------------------------------------------

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._tell(Logged(step=state.global_step, metrics={name: str(value) for name, value in numbers.items()}))
        for name in _NEVER_NON_FINITE:
            # With fp16 the scaler meets infinite gradients on purpose, and skips their steps.
            if name == "grad_norm" and args.fp16:
                continue
            if name in numbers and not math.isfinite(numbers[name]):
                self._meet_non_finite(name, step=state.global_step)

    def _meet_non_finite(self, metric: str, *, step: int) -> None:
        said = f"{metric} was not finite at step {step}"
        if self._config.spec.restarts.on_non_finite != "Warn":
            self._tell(NonFinite(metric=metric, step=step))
            raise RankFailure("NonFiniteLoss", said)
        if not self._met_non_finite:
            self._met_non_finite = True
            self._tell(NonFinite(metric=metric, step=step))
            logger.warning("%s, and the training goes on (spec.restarts.onNonFinite)", said)

    # --- Evaluation --------------------------------------------------------------------------------------------------

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._beat()
        if not self._evaluating:
            self._evaluating = True
            self._enter("evaluating", step=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluating = False
        self._enter("training", step=state.global_step)

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = self._storage / checkpoint_folder(state.global_step)
        _compat.save_logging_state(self.trainer, folder, rank=self._rank, method=self._config.method)
        self._keeper.wait()
        if dist.is_initialized():
            dist.barrier()  # every rank has written every file of this checkpoint
        self._keeper.finalise(state.global_step)
        self._beat()

    # --- Reports -----------------------------------------------------------------------------------------------------

    def _tell(self, body: Started | Logged | NonFinite | PhaseChanged) -> None:
        if self._reporter is not None:
            self._reporter.send(body)

    def _beat(self, *, step: int | None = None) -> None:
        if self._reporter is not None:
            self._reporter.beat(step=step)

    def _enter(self, phase: Any, *, step: int) -> None:
        if self._reporter is not None:
            self._reporter.beat(phase=phase, step=step)
            self._reporter.send(PhaseChanged(phase=phase, step=step))
