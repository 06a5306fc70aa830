"""Own code of a run in which everything that a loss depends on is fixed, and which ends with what its losses were."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

END = 1
# Four for each of two prompts, of unequal lengths, each beginning with a token of its own. Some come to their end.
COMPLETIONS = (
    [10, 45, END],
    [11, 99, 31, 70, 25, 81, 40, 120],
    [12, 64, 90, 77, END],
    [13, 118],
    [14, 31, 45, 121, 61, END],
    [15, 15, 20, 33],
    [16, 48, 91, 12, 36, 55, END],
    [17, 26, 115, 7, 61, 29, 41, 19],
)
# What three rewards say of each: right or wrong, a finer one, and one that cannot score all.
SCORES = (
    (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    (0.3, -0.1, 0.1, 0.9, -2.5, 1.75, 3.0, 0.25),
    (0.5, None, -0.25, 0.75, 1.0, 0.0, None, 0.125),
)
NOISE = 0.03
STEPS = 2


class Measured(Exception):
    """The end of a run; its argument is an entry for each micro-batch."""


class FixedTrainer(GRPOTrainer):
    """Takes COMPLETIONS for what it generated, changes its weights by noise, and keeps its losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = 0
        self.sampled_by = 0
        self.measured: list[dict[str, Any]] = []
        self.add_callback(FixedWeights(self))

    # The innermost of TRL 1.16's methods of a rollout, so that all around it is the trainer's own.
    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        assert len(prompt_ids) == len(COMPLETIONS)
        self.sampled_by = self.weights
        return [list(ids) for ids in COMPLETIONS], None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda module, given, output: seen.append(output.log_probs))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        hook.remove()
        [log_probs] = seen
        [slopes] = torch.autograd.grad(loss, log_probs, retain_graph=True)
        self.measured.append(
            {
                "step": self.state.global_step,
                "weights": self.weights,
                "sampled_by": self.sampled_by,
                "completions": [[ids[0] for ids in COMPLETIONS].index(int(row[0])) for row in inputs["completion_ids"]],
                "advantages": inputs["advantages"].tolist(),
                "loss": loss.item(),
                "slopes": slopes[:, -inputs["completion_ids"].shape[1] :].tolist(),
                "dtype": str(log_probs.dtype),
            }
        )
        return loss


class FixedWeights(TrainerCallback):
    """Adds noise to the weights before each step, and ends the run."""

    def __init__(self, trainer: FixedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.trainer.weights += 1
        add_noise(model, seed=self.trainer.weights)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            raise Measured(self.trainer.measured)


def add_noise(model: Any, *, seed: int) -> None:
    """Move each weight a little, in a way that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))


def score(completion_ids: list[list[int]], which: int, **columns: Any) -> list[float | None]:
    """Return what the given reward of SCORES says."""
    return [SCORES[which][COMPLETIONS.index(ids)] for ids in completion_ids]
