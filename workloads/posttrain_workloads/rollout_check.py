"""Whether the completions came from the weights that are trained.

It owns the bound on the difference between vLLM's log-probabilities and the trainer's, and to whom a completion is put
down; it must not import torch: rollout_differences.py measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.api.spelling import join_names
from posttrain_workloads.runtime import RankFailure

_BOUND_FLOAT32 = 3e-4
"""Twelve times the largest difference that rounding was seen to make, 2.4e-5; with a tiny model it makes 3e-6."""
_BOUND_ELSE = 0.1


class StaleRolloutWeights(RankFailure):
    """The completions are not from the weights that are trained."""

    def __init__(self, message: str) -> None:
        super().__init__("StaleRolloutWeights", message)


def bound_for(dtype: str) -> float:
    """Return the largest difference that rounding explains, where trainer and servers compute in `dtype`."""
    return _BOUND_FLOAT32 if dtype == "float32" else _BOUND_ELSE


def check_differences(differences: Mapping[str, float], *, overall: float, bound: float, where: str, step: int) -> None:
    """Judge the mean absolute differences of the log-probabilities of sampled tokens, of each source by itself.

    One of many servers that kept old weights moves the mean of all too little. `overall` is that mean, with the tokens
    that belong to no source; `where` has the sources' kind, a plural.

    Raises:
        StaleRolloutWeights: one of them is beyond the bound, or no number.
    """
    beyond = {source: difference for source, difference in differences.items() if not difference <= bound}
    if not beyond and overall <= bound:
        return
    rest = len(differences) - len(beyond)
    who = join_names([f"{source} (by {difference:.3g})" for source, difference in beyond.items()])
    if not beyond:
        told = (
            f"differ by {overall:.3g} between vLLM and the trainer, and nobody knows which of the {where} they are of"
        )
    elif rest:
        told = f"differ from the trainer's in those of {who}, and not in those of the other {where} ({rest})"
    else:
        told = f"differ from the trainer's in those of all {where}: {who}"
    raise StaleRolloutWeights(
        f"at step {step} the log-probabilities of the completions {told}; rounding explains {bound:g}: vLLM has other "
        "weights there than the trainer, or computes in another dtype"
    )


def attribute(
    origins: Sequence[int], turns: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[tuple[int | None, int]]:
    """Return the source of the first tokens of each completion, and how many those are.

    `turns` are what the first call of a rollout returned, `origins` its sources. A rollout function or a tool may have
    gone on from there, with whatever source; one that took another beginning has no source (None, 0).
    """
    if len(turns) != len(completions):
        return [(None, 0)] * len(completions)
    return [
        (origin, len(turn)) if list(completion[: len(turn)]) == list(turn) else (None, 0)
        for origin, turn, completion in zip(origins, turns, completions, strict=True)
    ]
