"""Own code of a run, as `spec.code` brings it: faults at the places where a real one would strike."""

from __future__ import annotations

import io
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from posttrain_workloads.own_rollouts import generate, tokenize


class KillAfterSave(TrainerCallback):
    """Ends its rank by SIGKILL when a checkpoint's files are written and its marker is not; once."""

    def __init__(self, step: int, flag: str) -> None:
        self.step = step
        self.flag = Path(flag)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class SlowShard(TrainerCallback):
    """Makes a rank write every file in two halves, with time between them for the others to go ahead."""

    def __init__(self, rank: int, seconds: float) -> None:
        if int(os.environ["RANK"]) != rank:
            return
        whole = torch.save

        def in_halves(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            buffer = io.BytesIO()
            whole(obj, buffer, *args, **kwargs)
            content = buffer.getvalue()
            with Path(f).open("wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                time.sleep(seconds)
                file.write(content[len(content) // 2 :])

        torch.save = in_halves


class NanTrainer(SFTTrainer):
    """Loses its loss at step 3."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.model.training and self.state.global_step == 2 else loss


class Halt(TrainerCallback):
    """Halts rank 0, for a test to strike: at the end of one step, and in the middle of the hand-over before another.

    The other ranks send nothing: they are through with a hand-over before rank 0 begins, and then wait for it.
    It makes a file, and goes on when the test has made another, also in a later attempt.
    """

    def __init__(self, folder: str, between: int, inside: int) -> None:
        self.folder = Path(folder)
        self.between = between
        self.inside = inside

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.between:
            self.halt("between")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step != self.inside:
            return
        parameters = model.named_parameters

        def halting(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for number, parameter in enumerate(parameters(*args, **kwargs)):
                if number == 5:
                    self.halt("inside")
                yield parameter

        model.named_parameters = halting

    def halt(self, where: str) -> None:
        if int(os.environ["RANK"]) != 0:
            return
        (self.folder / where).touch()
        while not (self.folder / f"{where}-over").exists():
            time.sleep(0.05)


class Abort(TrainerCallback):
    """Ends its process as native code does that finds itself in an impossible state."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            print("the last words", flush=True)
            os.abort()


def complete_twice(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Complete each prompt twice, as if it were not there as often as it is to be completed."""
    prompt_ids = tokenize(trainer, [prompt for prompt in prompts for _ in range(2)])
    completion_ids, logprobs = generate(trainer, prompt_ids)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}
