"""A trainer that compares vLLM's log-probabilities with its own after each rollout, before it trains on it.

It owns the comparison of each server, or each engine inside a rank, by itself; it must not judge it: rollout_check.py
does. TRL logs the mean of all, with the step that was trained then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from posttrain_workloads.rollout_check import attribute, check_differences

WORST = "sampling/sampling_logp_difference/worst"
"""The metric: the largest mean absolute difference of one server's or engine's tokens."""


@dataclass(frozen=True)
class Turn:
    """The first call of a rollout."""

    completions: Sequence[Sequence[int]]
    """This rank's."""
    servers: tuple[str, ...]
    """URLs of the completions of all ranks; rank 0 alone knows them."""


def compare_rollouts(trainer_class: Any, *, bound: float) -> Any:
    """Return the trainer class with an end where completions are not from the weights that are trained."""

    class ComparedTrainer(trainer_class):  # type: ignore[misc]
        _first_turn: Turn | None = None

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            self._first_turn = None
            return super()._generate(*args, **kwargs)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
            if self._first_turn is None:
                asks = self.vllm_mode == "server" and self.accelerator.is_main_process
                origins = self.vllm_generation.vllm_client.origins if asks else ()
                self._first_turn = Turn(completion_ids, tuple(origin.server for origin in origins))
            return completion_ids, logprobs

        def _generate_and_score_completions(self, inputs: list[Any]) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if self.vllm_importance_sampling_correction:  # else there may be nothing to compare with
                self._compare(output)
            return output

        def _compare(self, output: Mapping[str, Any]) -> None:
            sources, origins = _sources(self, self._first_turn)
            turns = self._first_turn.completions if self._first_turn is not None else ()
            sums = self.accelerator.reduce(sum_differences(output, turns, origins, sources=len(sources)), "sum")
            *each, (total, count) = sums.tolist()
            means = {source: sum_ / of for source, (sum_, of) in zip(sources, each, strict=True) if of}
            if means:
                self._metrics["train" if self.model.training else "eval"][WORST].append(max(means.values()))
            check_differences(
                means,
                overall=total / count if count else 0.0,
                bound=bound,
                where="rollout servers" if self.vllm_mode == "server" else "engines",
                step=self.state.global_step + 1,
            )

    ComparedTrainer.__name__ = trainer_class.__name__
    return ComparedTrainer


def sum_differences(
    output: Mapping[str, Any], turns: Sequence[Sequence[int]], origins: Sequence[int], *, sources: int
) -> torch.Tensor:
    """Return (sources + 1, 2) sums of absolute differences and numbers of tokens: each source's, then those of all.

    `output` is what TRL trains on, `origins` has the index of the source of each of `turns`. As in TRL's own metric a
    token that vLLM could not score does not count, nor one that the model did not write.
    """
    differences = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).abs().double()
    counted = output["completion_mask"].bool() & ~differences.isnan()
    if "tool_mask" in output:
        counted &= output["tool_mask"].bool()
    differences = differences.where(counted, 0.0)
    sums = torch.zeros(sources + 1, 2, dtype=torch.float64, device=differences.device)
    sums[-1, 0], sums[-1, 1] = differences.sum(), counted.sum()
    for row, (source, length) in enumerate(attribute(origins, turns, output["completion_ids"].tolist())):
        if source is not None:
            sums[source, 0] += differences[row, :length].sum()
            sums[source, 1] += counted[row, :length].sum()
    return sums


def _sources(trainer: Any, turn: Turn | None) -> tuple[list[str], list[int]]:
    """Return the names of what generated, and the index of that for each of this rank's completions of the turn."""
    count = len(turn.completions) if turn is not None else 0
    accelerator = trainer.accelerator
    if trainer.vllm_mode != "server":
        return [f"rank {rank}" for rank in range(accelerator.num_processes)], [accelerator.process_index] * count
    known: list[Any] = [None]
    if accelerator.is_main_process:
        servers = [server.base_url for server in trainer.vllm_generation.vllm_client.servers]
        known = [(servers, [servers.index(url) for url in turn.servers] if turn is not None else [])]
    broadcast_object_list(known, from_process=0)
    servers, origins = known[0]
    return servers, origins[accelerator.process_index * count :][:count]
