"""The trainer of GRPO with a clock, its newest completions, and checkpoints from which it goes on exactly.

It owns what is measured and kept of a rollout. Like callback.py it imports transformers at its top, so nothing that
must stay free of torch may import it.
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event, by position

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.contract.checkpoints import checkpoint_folder
from posttrain_workloads import _compat
from posttrain_workloads.completions import Completions, write_completions
from posttrain_workloads.reporting import Reporter
from posttrain_workloads.runtime import RankFailure
from posttrain_workloads.scoring import REASON, WatchedReward
from posttrain_workloads.signal import SignalWatch


class Watch:
    """Seconds of a step by what they went into, and the completions of the newest rollout."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.completions: Completions | None = None
        self.trainer: Any = None
        """Set once it is built: it is built with its callbacks."""
        self.sampler: Any = None
        """Of the trainer's prompts."""
        self._begin = 0.0

    def begin(self) -> None:
        """Begin a step."""
        self._begin = time.perf_counter()
        self.seconds = {"rollout": 0.0, "rewards": 0.0}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Add what the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin

    def end(self) -> dict[str, float]:
        """Return the seconds of the step that ends now: rollout, rewards, and what is left for training."""
        step = time.perf_counter() - self._begin
        return {**self.seconds, "training": step - sum(self.seconds.values()), "step": step}


def watch_rollouts(trainer_class: Any, watch: Watch, *, rewards: Sequence[WatchedReward]) -> Any:
    """Return the trainer class with its rollouts and rewards measured, and an end where nothing is rewarded at all."""

    class RolloutTrainer(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.trainer = self

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            watch.sampler = super()._get_train_sampler(*args, **kwargs)
            return watch.sampler

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with watch.measure("rollout"):
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with watch.measure("rewards"):
                scores: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
            if scores.isnan().all():
                raise RankFailure(REASON, _say_nothing_is_rewarded(len(scores), rewards))
            return scores

        def _generate_and_score_completions(self, inputs: list[Any]) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if self.model.training and self.accelerator.is_main_process:
                count = len(inputs) * self.accelerator.num_processes
                watch.completions = _compat.newest_completions(self, count=count)
            return output

    RolloutTrainer.__name__ = trainer_class.__name__
    return RolloutTrainer


class RolloutCallback(TrainerCallback):  # type: ignore[misc]
    """What is logged, told and kept of each step, and a begun rollout in a checkpoint."""

    def __init__(
        self,
        watch: Watch,
        signal: SignalWatch,
        *,
        storage: Path,
        rank: int,
        reporter: Reporter | None,
        resumed_from: Path | None,
    ) -> None:
        self._watch = watch
        self._signal = signal
        self._reporter = reporter
        self._storage = storage
        self._rank = rank
        self._resumed_from = resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._resumed_from is not None:
            _compat.skip_epochs(self._watch.sampler, int(state.epoch or 0))
            if not _compat.restore_rollout(self._watch.trainer, self._resumed_from, rank=self._rank):
                logging.warning(
                    "the checkpoint's completions are of another number of ranks: those that were not trained on yet "
                    "are left out, and the run goes on with new ones"
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, seconds in self._watch.end().items():
            _compat.add_metric(self._watch.trainer, f"time/{name}", seconds)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._reporter is not None:
            for change in self._signal.see(logs or {}, step=state.global_step):
                self._reporter.send(change)
        completions, self._watch.completions = self._watch.completions, None
        if completions is not None:
            write_completions(completions, storage=self._storage, step=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _compat.save_rollout(self._watch.trainer, self._storage / checkpoint_folder(state.global_step), rank=self._rank)


def _say_nothing_is_rewarded(completions: int, rewards: Sequence[WatchedReward]) -> str:
    names = ", ".join(reward.name for reward in rewards)
    known = ". ".join(why for reward in rewards if (why := reward.why_unscored()))
    why = f". {known}" if known else ", and none raised an error: each of them returned None"
    return f"no reward ({names}) could score any of {completions} completions{why}"
