"""GRPO's advantages and losses in float64, from the papers' formulas; NumPy alone, so that it runs beside any trainer.

A loss is that of one optimizer step over B completions of up to T tokens. `settings` are GRPOConfig's arguments, over
DEFAULTS. Where the trainer departs from a paper, the line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DEFAULTS: Mapping[str, Any] = {
    "loss_type": "dapo",
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "epsilon": 0.2,
    "epsilon_high": 0.2,
    "delta": np.inf,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
SMALL = 1e-4  # no paper has it: the trainer adds it to each standard deviation


def find_advantages(rewards: np.ndarray, weights: np.ndarray, *, group: int, settings: Mapping[str, Any]) -> np.ndarray:
    """Return (B,) advantages for (B, F) rewards of F functions, NaN where one does not score, in groups of a prompt.

    GRPO, arXiv 2402.03300, 4.1.2: (r - mean) / std over the group. Dr. GRPO, 2503.20783: without the std. PPO
    Lite, 2508.08221: with the std of the batch. GDPO, 2601.05242: each function by itself, then their sum over the
    batch. The trainer takes the unbiased std.
    """
    settings = {**DEFAULTS, **settings}
    unscored = np.isnan(rewards).all(axis=1)
    if settings["multi_objective_aggregation"] == "normalize_then_sum":
        single = rewards.reshape(-1, group, rewards.shape[1])
        single = (single - np.nanmean(single, axis=1, keepdims=True)) / find_deviation(single, axis=1)
        total = np.nansum(single.reshape(rewards.shape) * weights, axis=1)
        total[unscored] = np.nan
        advantages = (total - np.nanmean(total)) / find_deviation(total)
    else:
        total = np.nansum(rewards * weights, axis=1)
        groups = np.where(unscored, np.nan, total).reshape(-1, group)
        advantages = groups - np.nanmean(groups, axis=1, keepdims=True)
        if settings["scale_rewards"] == "group":
            advantages = advantages / find_deviation(groups, axis=1)
        elif settings["scale_rewards"] == "batch":
            advantages = advantages / find_deviation(groups)
    return np.where(unscored, 0.0, advantages.reshape(-1))


def find_deviation(values: np.ndarray, *, axis: int | None = None) -> np.ndarray:
    """Return the standard deviation of what is no NaN, as the trainer divides by it."""
    return np.nanstd(values, axis=axis, ddof=1, keepdims=True) + SMALL


def find_loss(
    policy: np.ndarray,
    *,
    held: np.ndarray,
    old: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray,
    advantages: np.ndarray,
    settings: Mapping[str, Any],
    micro_batches: int,
    tokens: float,
) -> float:
    """Return the loss for (B, T) log-probabilities of tokens, a mask of which of them count, and (B,) advantages.

    `held` is the policy where a formula stops the gradient: `policy` again, unless it is derived by. `tokens` is what a
    step takes of all tokens, `micro_batches` how many parts of equal size the B completions come in.
    """
    settings = {**DEFAULTS, **settings}
    advantage = advantages[:, None]
    ratio = find_ratio(policy - old, mask, level=settings["importance_sampling_level"])
    held_ratio = find_ratio(held - old, mask, level=settings["importance_sampling_level"])
    loss_type = settings["loss_type"]
    if loss_type == "cispo":
        # 2506.13585, with ScaleRL's bound, 2510.13786: the weight itself is at most epsilon_high. The trainer
        # has no lower bound (the paper: 1 - epsilon).
        objective = np.minimum(held_ratio, settings["epsilon_high"]) * advantage * policy
    elif loss_type == "sapo":  # 2511.20347: a gate for the bounds
        warm, cold = settings["sapo_temperature_pos"], settings["sapo_temperature_neg"]
        temperature = np.where(advantage > 0, warm, cold)
        objective = 4 / temperature / (1 + np.exp(-temperature * (ratio - 1))) * advantage
    elif loss_type == "vespo":  # 2602.10693: W^k exp(lambda (1 - W)), W the product over the whole sequence
        log_whole = ((held - old) * mask).sum(axis=1, keepdims=True)
        power = np.where(advantage >= 0, settings["vespo_k_pos"], settings["vespo_k_neg"])
        decay = np.where(advantage >= 0, settings["vespo_lambda_pos"], settings["vespo_lambda_neg"])
        objective = np.exp(power * log_whole + decay * (1 - np.exp(log_whole))) * advantage * policy
    else:  # 2402.03300, eq. 3; two bounds: DAPO, 2503.14476, eq. 8; delta: INTELLECT-2, 2505.07291
        lower, upper = 1 - settings["epsilon"], 1 + settings["epsilon_high"]
        bounded = np.minimum(ratio, settings["delta"])
        objective = np.minimum(bounded * advantage, np.clip(ratio, lower, upper) * advantage)
    if settings["beta"]:
        away = reference - policy
        kl = np.exp(away) - away - 1  # 2402.03300, eq. 4: the estimator k3
        if settings["use_bias_correction_kl"]:
            kl = kl * ratio  # DeepSeek-V3.2, 2512.02556, eq. 7; the trainer's default
        objective = objective - settings["beta"] * kl
    summed = (-objective * mask).sum(axis=1)  # over the tokens of a completion
    lengths = mask.sum(axis=1)
    if loss_type in ("grpo", "sapo"):
        loss = np.mean(summed / np.maximum(lengths, 1))
    elif loss_type == "luspo":  # 2602.05261: GSPO's objective of a sequence, times its length
        loss = np.mean(summed)
    elif loss_type == "dr_grpo":  # 2503.20783; its code, as the trainer, divides by the longest length allowed
        loss = np.mean(summed) / settings["max_completion_length"]
    elif loss_type == "bnpo":  # of no paper: over the tokens of each micro-batch
        sums, counts = (part.reshape(micro_batches, -1).sum(axis=1) for part in (summed, lengths))
        loss = np.mean(sums / np.maximum(counts, 1))
    else:  # DAPO, 2503.14476, eq. 8, and CISPO, per prompt; the trainer: over all prompts
        loss = summed.sum() / tokens
    return float(loss)


def find_ratio(log_ratio: np.ndarray, mask: np.ndarray, *, level: str) -> np.ndarray:
    """Return (B, T) ratios of the tokens, or (B, 1) of the sequences: GSPO, 2507.18071, eq. 7, a geometric mean."""
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(axis=1, keepdims=True) / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return np.exp(log_ratio)
