"""GRPO's advantages and losses against a reference in float64: one process of the trainer's environment has all cases.

Each case is a run as grpo.py makes it, of two optimizer steps with two micro-batches each, on eight fixed completions
of unequal lengths, four for each of two prompts. Before each step the weights get noise, so that the policy, the old
policy (a rollout serves both steps) and the reference differ. Compared are the advantages, the loss of each step, and
its slopes by the log-probabilities, by which a formula with a stopped gradient differs from one without.

TRL 1.16 departs from the papers (_grpo_reference.py names the equations) in this:

- Every std of rewards is the unbiased one and 1e-4 is added to it; 2402.03300 says neither.
- By default (`use_bias_correction_kl`) the KL term of every loss type is `ratio * k3`, that of DeepSeek-V3.2
  (2512.02556, eq. 7); 2402.03300 has k3 alone.
- `dr_grpo` is `sum / (B * max_completion_length)`; the formula of 2503.20783 has no such constant, its code has.
- `dapo`, `cispo` and `vespo` divide by the tokens of all prompts of a rollout, times the share of the rollout that a
  step trains on; 2503.14476 and 2506.13585 by those of one prompt's group, within a mean over prompts, and 2602.10693
  leaves it open.
- `cispo` is `min(ratio, epsilon_high) * A * log p`: the bound is ScaleRL's (2510.13786), and the lower bound of
  2506.13585 is missing. GRPOConfig's default 0.2 for it caps every weight at a fifth.
- `bnpo` divides by the tokens of each micro-batch. It is of no paper; 2506.02864, of the same name, is about rewards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.args import load_table
from tests.workloads._configs import build_grpo_config, free_port
from tests.workloads._prepare_configs import run_script, write_jsonl

pytestmark = pytest.mark.workloads

OWN_CODE = Path(__file__).with_name("own_code")
TOLERANCE = 1e-5

# All that TRL has: test_args_table.py holds the table against it.
LOSS_TYPES, SCALES = (load_table("grpo_config").keys[key].type["enum"] for key in ("loss_type", "scale_rewards"))
CLIPPED = {"grpo", "dr_grpo", "dapo", "bnpo", "luspo"}
PROMPTS = ("w4 w40 w44", "w30 w31 w32 w3 w5 w33 w60")
BATCH = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 4,
    "max_completion_length": 10,
    "learning_rate": 0.0,
    "shuffle_dataset": False,
}
OF_LOSS_TYPE: Mapping[str, Mapping[str, Any]] = {
    **{name: {"epsilon_high": 0.28} for name in CLIPPED},
    "cispo": {"epsilon_high": 1.2},
    "luspo": {"epsilon": 0.05, "epsilon_high": 0.08, "importance_sampling_level": "sequence"},
}
ALL_REWARDS: Sequence[tuple[int, str]] = ((0, "1"), (1, "0.5"))

CASES: dict[str, dict[str, Any]] = {
    f"{loss_type}, {scale}, beta {beta}": {"loss_type": loss_type, "scale_rewards": scale, "beta": beta}
    for loss_type in LOSS_TYPES
    for scale in SCALES
    for beta in (0.0, 0.3)
} | {
    "grpo, k3 alone": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    "vespo, k3 alone": {"loss_type": "vespo", "beta": 0.3, "use_bias_correction_kl": False},
    "grpo by sequences": {"loss_type": "grpo", "beta": 0.3, "importance_sampling_level": "sequence"},
    "grpo, every completion in one step": {"loss_type": "grpo", "num_iterations": 1},
    "grpo, a step of half a rollout": {"loss_type": "grpo", "num_iterations": 1, "gradient_accumulation_steps": 1},
    "dapo, a step of half a rollout": {"loss_type": "dapo", "num_iterations": 1, "gradient_accumulation_steps": 1},
    "dapo, ended completions alone": {"loss_type": "dapo", "mask_truncated_completions": True},
    "grpo, ended completions alone": {"loss_type": "grpo", "mask_truncated_completions": True},
    "dapo, two-sided": {"loss_type": "dapo", "delta": 1.4},
    "dapo, hotter": {"loss_type": "dapo", "beta": 0.3, "temperature": 1.5},
    "sapo, other temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    "dapo, each reward by itself": {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
}  # fmt: skip
UNSCORED = {
    "dapo, some unscored": ((2, "1"),),
    "dapo, some scored by one alone": ((0, "1"), (2, "2")),
}
CASES |= {name: {"loss_type": "dapo"} for name in UNSCORED}

# What is changed in the reference, and the loss types of which it matters.
EVERY = set(LOSS_TYPES)
BY_TOKENS = {"dapo", "cispo", "vespo"}
BY_COMPLETIONS = {"grpo", "sapo"}
MUTANTS: dict[str, tuple[str, str, set[str]]] = {
    # Advantages
    "the sign of the advantage": ("advantages = groups - np", "advantages = -groups + np", EVERY),
    "no mean": (" = groups - np.nanmean(groups, axis=1, keepdims=True)", " = groups", EVERY),
    "the mean of the batch": ("np.nanmean(groups, axis=1, keepdims=True)", "np.nanmean(groups)", EVERY),
    "a biased deviation": ("ddof=1", "ddof=0", EVERY),
    "the deviation of the batch": ("find_deviation(groups, axis=1)", "find_deviation(groups)", EVERY),
    "the deviation of the group": ("find_deviation(groups)", "find_deviation(groups, axis=1)", EVERY),
    "no deviation of the group": (" / find_deviation(groups, axis=1)", "", EVERY),
    "no deviation of the batch": (" / find_deviation(groups)", "", EVERY),
    "nothing added to the deviation": ("SMALL = 1e-4", "SMALL = 0.0", EVERY),
    "rewards without their weights": ("total = np.nansum(rewards * weights", "total = np.nansum(rewards", EVERY),
    "the unscored are zero": ("np.where(unscored, np.nan, total)", "total", {"dapo"}),
    "GDPO without the batch": (" / find_deviation(total)", "", {"dapo"}),
    "GDPO without the group": (" / find_deviation(single, axis=1)", "", {"dapo"}),
    # Ratios and bounds
    "the ratio upside down": ("find_ratio(policy - old", "find_ratio(old - policy", EVERY),
    "ratios of sequences are products": (" / np.maximum(mask.sum(axis=1, keepdims=True), 1)", "", {"grpo", "luspo"}),
    "no bounds": ("np.clip(ratio, lower, upper)", "ratio", CLIPPED),
    "no lower bound": ("np.clip(ratio, lower, upper)", "np.clip(ratio, None, upper)", CLIPPED),
    "no upper bound": ("np.clip(ratio, lower, upper)", "np.clip(ratio, lower, None)", CLIPPED),
    "one bound for both sides": ('1 + settings["epsilon_high"]', '1 + settings["epsilon"]', CLIPPED),
    "bounds alone": ("objective = np.minimum(bounded * advantage, ", "objective = (", CLIPPED),
    "a maximum for the minimum": ("np.minimum(bounded", "np.maximum(bounded", CLIPPED),
    "no second upper bound": ('np.minimum(ratio, settings["delta"])', "ratio", {"dapo"}),
    "CISPO without a bound": ('np.minimum(held_ratio, settings["epsilon_high"])', "held_ratio", {"cispo"}),
    "CISPO with a bound as of DAPO": (
        'ratio, settings["epsilon_high"])',
        'ratio, 1 + settings["epsilon_high"])',
        {"cispo"},
    ),
    "CISPO without a stopped gradient": ("np.minimum(held_ratio", "np.minimum(ratio", {"cispo"}),
    "SAPO with one temperature": ("np.where(advantage > 0, warm, cold)", "warm", {"sapo"}),
    "SAPO with the temperatures exchanged": ("np.where(advantage > 0", "np.where(advantage < 0", {"sapo"}),
    "SAPO without its scale": ("4 / temperature / ", "4 / ", {"sapo"}),
    "VESPO by the mean": ("((held - old) * mask).sum(", "((held - old) * mask).mean(", {"vespo"}),
    "VESPO with the powers exchanged": ("power = np.where(advantage >= 0", "power = np.where(advantage < 0", {"vespo"}),
    "VESPO with the decays exchanged": ("decay = np.where(advantage >= 0", "decay = np.where(advantage < 0", {"vespo"}),
    "VESPO without a stopped gradient": ("((held - old) * mask)", "((policy - old) * mask)", {"vespo"}),
    # KL
    "the sign of the KL": ('objective - settings["beta"]', 'objective + settings["beta"]', EVERY),
    "k1": ("kl = np.exp(away) - away - 1", "kl = -away", EVERY),
    "k2": ("kl = np.exp(away) - away - 1", "kl = away**2 / 2", EVERY),
    "the KL the other way": ("away = reference - policy", "away = policy - reference", EVERY),
    "the KL to the old policy": ("away = reference - policy", "away = old - policy", EVERY),
    "the KL without its ratio": ("kl = kl * ratio", "kl = kl", EVERY),
    # From tokens to the loss
    "the sign of the loss": ("(-objective * mask)", "(objective * mask)", EVERY),
    "tokens beyond the mask": ("(-objective * mask)", "(-objective * np.ones_like(mask))", EVERY),
    "a sum over the tokens": ("np.mean(summed / np.maximum(lengths, 1))", "np.mean(summed)", BY_COMPLETIONS),
    "a sum over the completions": ("np.mean(summed / np", "np.sum(summed / np", BY_COMPLETIONS),
    "a mean over the tokens": ("np.mean(summed / np.maximum(lengths, 1))", "summed.sum() / tokens", BY_COMPLETIONS),
    "a mean over the completions": ("summed.sum() / tokens", "np.mean(summed / np.maximum(lengths, 1))", BY_TOKENS),
    "a sum over all tokens": ("summed.sum() / tokens", "summed.sum()", BY_TOKENS),
    "the tokens of the step": ("summed.sum() / tokens", "summed.sum() / lengths.sum()", {"dapo"}),
    "LUSPO without the length": ("loss = np.mean(summed)\n", "loss = np.mean(summed / lengths)\n", {"luspo"}),
    "Dr. GRPO as its formula": (' / settings["max_completion_length"]', "", {"dr_grpo"}),
    "Dr. GRPO by the longest": (' / settings["max_completion_length"]', " / lengths.max()", {"dr_grpo"}),
    "Dr. GRPO by each length": ('(summed) / settings["max_completion_length"]', "(summed / lengths)", {"dr_grpo"}),
    "BNPO by the step": ("np.mean(sums / np.maximum(counts, 1))", "np.sum(sums) / np.sum(counts)", {"bnpo"}),
}


@pytest.fixture(scope="module")
def found(trainer_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What truth_cases.py found."""
    folder = tmp_path_factory.mktemp("truth")
    rows = write_jsonl(folder / "rows.jsonl", [{"problem": prompt} for prompt in PROMPTS])
    cases = []
    for index, (name, args) in enumerate(CASES.items()):
        rewards = UNSCORED.get(name, ALL_REWARDS)
        config = build_grpo_config(
            model=folder / "model",
            rows=rows,
            rewards=[
                {"function": "fixed_rollouts:score", "params": {"which": which}, "weight": weight}
                for which, weight in rewards
            ],
            args={**BATCH, **OF_LOSS_TYPE.get(args["loss_type"], {}), **args},
            grpo={"trainerClass": "fixed_rollouts:FixedTrainer"},
        )
        cases.append(
            {
                "name": name,
                "config": json.loads(config.to_json()),
                "storage": str(folder / f"storage-{index}"),
                "rewards": [which for which, _ in rewards],
                "weights": [float(weight) for _, weight in rewards],
            }
        )
    mutants = [{"name": name, "of": of, "to": to} for name, (of, to, _) in MUTANTS.items()]
    asked = {
        "model": str(folder / "model"),
        "code": str(OWN_CODE),
        "prompts": PROMPTS,
        "cases": cases,
        "mutants": mutants,
    }
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return run_script(
        "truth_cases.py",
        asked,
        python=trainer_python,
        folder=folder,
        environ={"HF_HUB_OFFLINE": "1", **rank, **rendezvous},
    )


@pytest.mark.parametrize("name", CASES)
def test_advantages_and_loss_are_those_of_the_formulas(found: dict[str, Any], name: str) -> None:
    case = found["cases"][name]
    assert set(case["dtypes"]) == {"torch.float32"}
    assert {key: value for key, value in case["differences"].items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("loss_type", sorted(CLIPPED))
def test_the_fixed_batch_is_clipped_on_both_sides(found: dict[str, Any], loss_type: str) -> None:
    below, above = found["cases"][f"{loss_type}, group, beta 0.0"]["clipped"]
    assert below > 0
    assert above > 0


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_formula_is_found_out(found: dict[str, Any], mutant: str) -> None:
    differing = {name for name, difference in found["mutants"][mutant].items() if difference > TOLERANCE}
    assert {CASES[name]["loss_type"] for name in differing} == MUTANTS[mutant][2]
