"""The shape of `spec.grpo.signal`: when the signal that a grpo run learns from counts as lost, and what follows.

It owns the checks, their bounds and the metrics and reasons that belong to them; it must not count steps, nor decide
anything about a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from posttrain.api.base import ApiModel, Decimal, Fraction

SignalPolicy = Literal["Warn", "Suspend", "Fail"]


class SignalCheck(ApiModel):
    """One check: a metric that is beyond its bound for a number of logged steps in a row."""

    METRIC: ClassVar[str]
    """As TRL 1.16 logs it (trl/trainer/grpo_trainer.py)."""
    BAD: ClassVar[Literal["at least", "above", "below"]]
    """On which side of the bound."""
    REASON: ClassVar[str]

    bound: str
    policy: SignalPolicy = Field(
        default="Warn",
        description="What follows: an event and the condition SignalHealthy (Warn); and the run is suspended after a "
        "checkpoint (Suspend), or fails (Fail). Default: Warn.",
        examples=["Suspend"],
    )
    steps: int = Field(
        default=20,
        ge=1,
        le=1_000_000,
        description="For how many logged steps in a row, counted anew when an attempt begins. Default: 20.",
        examples=[50],
    )

    def finds(self, value: float) -> bool:
        """Return whether a finite value is beyond the bound."""
        bound = float(self.bound)
        return {"at least": value >= bound, "above": value > bound, "below": value < bound}[self.BAD]


class DeadReward(SignalCheck):
    """Completions of a prompt are all rewarded alike: nothing says which of them was better."""

    METRIC = "frac_reward_zero_std"
    BAD = "at least"
    REASON = "RewardSignalDead"

    bound: Fraction = Field(
        default="0.95",
        description="Share of the groups, with scale_rewards batch of the batches, in which all completions get the "
        'same reward (TRL\'s frac_reward_zero_std), from which on. Default: "0.95".',
        examples=["0.9"],
    )


class EntropyCollapse(SignalCheck):
    """The model is nearly certain of each token: it does not try anything any more."""

    METRIC = "entropy"
    BAD = "below"
    REASON = "EntropyCollapsed"

    bound: Decimal = Field(
        default="0.01",
        description="Mean entropy of the model over the tokens of completions, in nats (TRL's entropy), below which. "
        'Default: "0.01".',
        examples=["0.05"],
    )


class KlDivergence(SignalCheck):
    """The model has moved far away from the reference model. Looked at where args.beta is not 0."""

    METRIC = "kl"
    BAD = "above"
    REASON = "KlTooLarge"

    bound: Decimal = Field(
        default="1",
        description="Mean KL divergence from the reference model, in nats a token (TRL's kl), above which. It is "
        'computed only where args.beta is not 0. Default: "1".',
        examples=["0.2"],
    )


class ClippedCompletions(SignalCheck):
    """Completions end because they are cut off, so the model never learns from an end of its own."""

    METRIC = "completions/clipped_ratio"
    BAD = "at least"
    REASON = "CompletionsClipped"

    bound: Fraction = Field(
        default="0.95",
        description="Share of the completions that max_completion_length cuts off (TRL's completions/clipped_ratio), "
        'from which on. Default: "0.95".',
        examples=["0.5"],
    )


class Signal(ApiModel):
    """Checks of what a run learns from. Numbers that are not finite count nowhere: see restarts.onNonFinite."""

    dead_reward: DeadReward = Field(
        default=DeadReward(),
        description="Nearly all groups of completions are rewarded alike. Default: a warning at 0.95 for 20 logged "
        "steps.",
        examples=[{"bound": "0.9", "policy": "Suspend", "steps": 50}],
    )
    entropy_collapse: EntropyCollapse = Field(
        default=EntropyCollapse(),
        description="The model is nearly certain of each token. Default: a warning below 0.01 for 20 logged steps.",
        examples=[{"bound": "0.05", "policy": "Fail"}],
    )
    kl_divergence: KlDivergence = Field(
        default=KlDivergence(),
        description="The model has moved far away from the reference model. Default: a warning above 1 for 20 logged "
        "steps.",
        examples=[{"bound": "0.2", "policy": "Suspend", "steps": 5}],
    )
    clipped_completions: ClippedCompletions = Field(
        default=ClippedCompletions(),
        description="Nearly all completions are cut off. Default: a warning at 0.95 for 20 logged steps.",
        examples=[{"bound": "0.5"}],
    )

    @property
    def checks(self) -> Mapping[str, SignalCheck]:
        """All of them by the field's name, in their order."""
        return {
            "dead_reward": self.dead_reward,
            "entropy_collapse": self.entropy_collapse,
            "kl_divergence": self.kl_divergence,
            "clipped_completions": self.clipped_completions,
        }
