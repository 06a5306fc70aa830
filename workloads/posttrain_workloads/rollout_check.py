"""Whether the completions came from the weights that are trained.

It owns the bound on the difference between the servers' and the trainer's log-probabilities; it must not measure it:
TRL logs it with every step.
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event, by position

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain_workloads.runtime import RankFailure

METRIC = "sampling/sampling_logp_difference/mean"
"""Mean absolute difference of the log-probabilities of the sampled tokens."""
_BOUND_FLOAT32 = 1e-4
"""Eight times the largest difference that rounding was seen to make, 1.2e-5; with a tiny model it makes 3e-6."""
_BOUND_ELSE = 0.1


class StaleRolloutWeights(RankFailure):
    """The completions are not from the weights that are trained."""

    def __init__(self, message: str) -> None:
        super().__init__("StaleRolloutWeights", message)


def bound_for(dtype: str) -> float:
    """Return the largest difference that rounding explains, where trainer and servers compute in `dtype`."""
    return _BOUND_FLOAT32 if dtype == "float32" else _BOUND_ELSE


class RolloutCheck(TrainerCallback):  # type: ignore[misc]
    """Ends the training when a logged difference is beyond the bound."""

    def __init__(self, bound: float) -> None:
        self._bound = bound

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the difference, where this log line has one.

        Raises:
            StaleRolloutWeights: it is beyond the bound, or no number.
        """
        difference = (logs or {}).get(METRIC)
        if difference is not None and not difference <= self._bound:
            raise StaleRolloutWeights(
                f"at step {state.global_step} the log-probabilities of the completions differ by {difference:.3g} "
                f"between vLLM and the trainer ({METRIC}); rounding explains {self._bound:g}: vLLM has other weights "
                "than the trainer, or computes in another dtype"
            )
