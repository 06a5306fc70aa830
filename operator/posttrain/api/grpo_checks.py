"""What is wrong with `spec.grpo` beyond its schema: rewards and their parameters, groups that do not fit the batches.

It owns these problems and their wording; it must not look at the data, nor at what the machine has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import JsonValue

from posttrain.api.base import JsonObject
from posttrain.api.grpo import Grpo
from posttrain.api.methods import Path, args_path, table_of
from posttrain.api.rewards import REWARDS, check_reward
from posttrain.api.rollout_checks import find_rollout_problems
from posttrain.api.spelling import join_names
from posttrain.api.training_run import TrainingRunSpec

_ARGS = args_path("grpo")
_SHOWN_VALUES = 12


def find_grpo_problems(spec: TrainingRunSpec) -> list[tuple[Path, str]]:
    """Return path and message of every problem; none for a run of another method. The `args` must be without any."""
    if spec.grpo is None:
        return []
    world_size = spec.resources.world_size
    groups = [*_groups(spec.grpo, world_size=world_size), *_evaluated_groups(spec.grpo, world_size=world_size)]
    return [*_rewards(spec.grpo), *groups, *find_rollout_problems(spec), *_signal(spec.grpo)]


def _rewards(grpo: Grpo) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for index, reward in enumerate(grpo.rewards):
        if reward.name is None:
            continue
        path: Path = ("spec", "grpo", "rewards", index)
        for problem in check_reward(reward.name, reward.params):
            place = ("name",) if problem.param is None else ("params", problem.param)
            found.append(((*path, *place), problem.message))
    return found


@dataclass(frozen=True, kw_only=True)
class Groups:
    """How the completions of one rollout come about, and in groups of which size."""

    per_device: int
    steps_per_generation: int
    world_size: int
    num_generations: int

    @property
    def of_a_rank(self) -> int:
        """Completions that one rank makes."""
        return self.per_device * self.steps_per_generation

    @property
    def of_all(self) -> int:
        """Completions of all ranks."""
        return self.of_a_rank * self.world_size


def count_groups(args: JsonObject, *, world_size: int) -> Groups | None:
    """Return the sizes that `args` ask for, as TRL fills them in; None where TRL takes nothing of the kind."""
    per_device = _integer(args, "per_device_train_batch_size")
    generations = _integer(args, "num_generations")
    steps = args.get("steps_per_generation")
    batch = args.get("generation_batch_size")
    if not isinstance(steps, int):
        steps = _integer(args, "gradient_accumulation_steps")
        if isinstance(batch, int):
            steps, rest = divmod(batch, max(per_device * world_size, 1))
            if rest:
                return None
    elif batch is not None:
        return None
    groups = Groups(
        per_device=per_device, steps_per_generation=steps, world_size=world_size, num_generations=generations
    )
    return groups if groups.of_all > 0 and generations > 0 else None


def _groups(grpo: Grpo, *, world_size: int) -> list[tuple[Path, str]]:
    groups = count_groups(grpo.args, world_size=world_size)
    if groups is None:
        return []  # the real class says why
    path = (*_ARGS, "num_generations")
    rollout = (
        f"per_device_train_batch_size {groups.per_device} x steps_per_generation {groups.steps_per_generation}"
        " (by default gradient_accumulation_steps)"
    )
    if groups.of_all % groups.num_generations or groups.num_generations < 2:
        return [
            (
                path,
                f"{groups.num_generations} completions of a prompt do not fill up the {groups.of_all} of a rollout "
                f"({rollout} x {_ranks(world_size)}): {_values(groups.of_all)}",
            )
        ]
    comparing = _comparing(grpo)
    if comparing and groups.of_a_rank % groups.num_generations:
        return [
            (
                path,
                f"reward {comparing} compares the completions of a prompt, and a rank makes {groups.of_a_rank} "
                f"({rollout}), which are no whole groups of {groups.num_generations}: {_values(groups.of_a_rank)}, or "
                f"make per_device_train_batch_size x steps_per_generation a multiple of {groups.num_generations}",
            )
        ]
    return []


def _evaluated_groups(grpo: Grpo, *, world_size: int) -> list[tuple[Path, str]]:
    """Find groups that an evaluation would not have whole."""
    if grpo.args.get("eval_strategy", "no") == "no":
        return []
    per_device = _integer(grpo.args, "per_device_eval_batch_size")
    generations = _integer(grpo.args, "num_generations_eval") or _integer(grpo.args, "num_generations")
    if per_device < 1 or generations < 1:
        return []  # the real class says why
    comparing, together = _comparing(grpo), per_device * world_size
    if together % generations:
        fault = f"and {_ranks(world_size)} make {together} at once"
        least = generations // math.gcd(generations, world_size)
    elif comparing and per_device % generations:
        together, fault = per_device, f"reward {comparing} compares those of a prompt, and a rank makes {per_device}"
        least = generations
    else:
        return []
    return [
        (
            (*_ARGS, "per_device_eval_batch_size"),
            f"an evaluation makes {generations} completions of each prompt (num_generations_eval, by default "
            f"num_generations), {fault}, which are no whole groups: write {-(-per_device // least) * least}, or for "
            f"num_generations_eval {_fitting(together, at_least=1)}",
        )
    ]


def _comparing(grpo: Grpo) -> str | None:
    """Return a reward that compares the completions of a prompt, if the run has one."""
    known = [REWARDS[reward.name] for reward in grpo.rewards if reward.name is not None and reward.name in REWARDS]
    return next((info.name for info in known if info.compares_group), None)


def _signal(grpo: Grpo) -> list[tuple[Path, str]]:
    """Find a check that somebody relies on and that would never find anything."""
    policy = grpo.signal.kl_divergence.policy
    if policy == "Warn" or grpo.args.get("beta", table_of("grpo").keys["beta"].default):
        return []
    return [
        (
            ("spec", "grpo", "signal", "klDivergence", "policy"),
            f"{policy} would never come: without a reference model (spec.grpo.args.beta is 0) no KL divergence is "
            "computed: set beta, or leave klDivergence out",
        )
    ]


def _values(total: int) -> str:
    """Return what num_generations may be."""
    if total < 2:
        return "raise per_device_train_batch_size: a group has at least 2"
    return f"write {_fitting(total, at_least=2)}"


def _fitting(total: int, *, at_least: int) -> str:
    """Return the sizes of which a number of completions is whole groups."""
    fitting = [str(number) for number in range(at_least, total + 1) if total % number == 0]
    return join_names(fitting[:_SHOWN_VALUES], conjunction="or")


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def _integer(args: JsonObject, key: str) -> int:
    value: JsonValue = args.get(key, table_of("grpo").keys[key].default)
    return value if isinstance(value, int) else 0
