"""From the rewards of a GRPO recipe of open-r1 to those of a TrainingRun.

It owns which key of a recipe is which parameter of which reward; it must not judge names and values: the API does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.api.spelling import join_names
from posttrain.recipe import Recipe, UnusableRecipe, write_decimal

PARAMS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "code_eval_scoring_mode": (("cf_code", "scoring_mode"),),
    "code_eval_test_batch_size": (("ioi_code", "test_batch_size"), ("cf_code", "test_batch_size")),
    "code_language": (("code_format", "language"),),
    "cosine_max_len": (("cosine", "max_len"),),
    "cosine_max_value_correct": (("cosine", "max_value_correct"),),
    "cosine_max_value_wrong": (("cosine", "max_value_wrong"),),
    "cosine_min_value_correct": (("cosine", "min_value_correct"),),
    "cosine_min_value_wrong": (("cosine", "min_value_wrong"),),
    "max_completion_len": (("soft_overlong_punishment", "max_completion_len"),),
    "repetition_max_penalty": (("repetition_penalty", "max_penalty"),),
    "repetition_n_grams": (("repetition_penalty", "ngram_size"),),
    "soft_punish_cache": (("soft_overlong_punishment", "soft_punish_cache"),),
}
"""The parameters that a key of a recipe is, each with its reward."""

# The default of open-r1's script.
_DEFAULT = ("accuracy", "format", "tag_count")


def take_rewards(recipe: Recipe) -> list[dict[str, Any]]:
    """Return `spec.grpo.rewards`, and take out of the recipe what they are made of.

    Raises:
        UnusableRecipe: `reward_funcs` is no list of names, or there are not as many weights as names.
    """
    names = _names(recipe)
    rewards: list[dict[str, Any]] = [{"name": name} for name in names]
    for reward, weight in zip(rewards, _weights(recipe, names), strict=True):
        if weight != "1":
            reward["weight"] = weight
    for key, targets in PARAMS.items():
        if key not in recipe.rest:
            continue
        chosen = [(reward, param) for name, param in targets for reward in rewards if reward["name"] == name]
        if not chosen:
            owners = join_names([name for name, _ in targets], conjunction="or")
            recipe.drop(key, f"it belongs to the reward {owners}, which reward_funcs does not name")
            continue
        value = recipe.take(key)
        for reward, param in chosen:
            reward.setdefault("params", {})[param] = value
    if any(reward["name"] == "cosine" and "min_value_wrong" not in reward.get("params", {}) for reward in rewards):
        recipe.notes.append(
            "cosine_min_value_wrong is -1.0 by default here, as open-r1 documents it, and 0.0 in its script, where a "
            "short wrong answer gets more than a long one: write min_value_wrong: 0.0 for that"
        )
    return rewards


def _names(recipe: Recipe) -> list[str]:
    given = recipe.take("reward_funcs")
    if given is None:
        recipe.notes.append(f"reward_funcs is not set: the rewards are open-r1's default, {join_names(_DEFAULT)}")
        return list(_DEFAULT)
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UnusableRecipe("reward_funcs is no list of names: write one such as [accuracy, format]")
    return names


def _weights(recipe: Recipe, names: list[str]) -> list[Any]:
    given = recipe.take("reward_weights")
    if given is None:
        return ["1"] * len(names)
    weights = given if isinstance(given, list) else [given]
    if len(weights) != len(names):
        raise UnusableRecipe(
            f"reward_weights has {len(weights)} numbers for {len(names)} rewards ({join_names(names)}): write one each"
        )
    return [write_decimal(weight) for weight in weights]
