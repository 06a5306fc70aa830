"""What prepare looks at for GRPO: rewards, every prompt, its length, rollouts, steps and memory.

It owns the order of these checks and their wording; it must not load a model, nor generate anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.api.grpo_checks import count_groups
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.arguments import training_args
from posttrain_workloads.data import Mixture, load_mixture
from posttrain_workloads.engine_checks import check_heads, check_server_memory
from posttrain_workloads.forecast import forecast_memory
from posttrain_workloads.formats import Scan, scan_rows
from posttrain_workloads.outcome import KnownModel, Outcome
from posttrain_workloads.own_environments import check_environment
from posttrain_workloads.own_rollouts import ENVIRONMENT, load_rollouts
from posttrain_workloads.problems import Findings, Problem, refuse
from posttrain_workloads.prompts import PROMPT, shape_prompts
from posttrain_workloads.reward_checks import check_columns, check_contests, check_endpoints, try_own_rewards
from posttrain_workloads.scoring import WatchedReward, build_rewards
from posttrain_workloads.server_options import check_server_options

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOConfig

SHOWN_ROWS = 8
_LONGEST_ROWS = 16
_EVAL_DATASETS = "spec.evalDatasets"


def check_grpo(
    config: TrainingConfig,
    outcome: Outcome,
    *,
    args: GRPOConfig | None,
    model: KnownModel,
    environ: Mapping[str, str],
) -> None:
    """Look at prompts and rewards, and forecast steps and memory, as far as there is what that takes."""
    findings = outcome.findings
    rewards: list[WatchedReward] = []
    with findings.collect():
        rewards = build_rewards(config, environ=environ)
    with findings.collect():
        environment = load_rollouts(config).get(ENVIRONMENT)
        if environment is not None and model.tokenizer is not None:
            check_environment(environment, model.tokenizer)
    check_endpoints(config, findings, environ=environ)
    check_reference(config, findings)
    check_loss(config, findings)
    warn_of_unseen_weights(args, findings)
    check_server_options(config, findings)
    check_heads(config, findings, model)
    check_server_memory(config, findings, outcome.estimates, model, environ=environ)
    mixture: Mixture | None = None
    # Without a tokenizer, which is a problem already, the rest is looked at as with most models.
    templated = model.tokenizer is None or bool(model.tokenizer.chat_template)
    with findings.collect():
        shape = functools.partial(shape_prompts, config, templated=templated)
        mixture = load_mixture(config, shape=shape, environ=environ)
    if mixture is None:
        return
    evaluated = find_evaluated(config, mixture, environ=environ)
    check_rewards(config, findings, mixture, evaluated=evaluated, rewards=rewards)
    longest = check_prompts(config, outcome, mixture, evaluated=evaluated, model=model, environ=environ)
    if args is None:
        return
    forecast_rollouts(config, outcome, args, prompts=len(mixture.train))
    if longest is not None and model.parameters is not None and config.gang.gpus_per_node:
        forecast_memory(
            config,
            findings,
            outcome.estimates,
            args,
            shape=model.shape,
            parameters=model.parameters,
            sequences=args.per_device_train_batch_size,
            length=longest + (args.max_completion_length or 0),
        )


# --- Arguments -------------------------------------------------------------------------------------------------------


def check_reference(config: TrainingConfig, findings: Findings) -> None:
    """See that the reference model would be the one that training starts from."""
    beta = config.args.get("beta", 0.0)
    if beta and config.spec.model.config and config.spec.peft is None:
        findings.add(
            Problem(
                "ConfigInvalid",
                "spec.grpo.args.beta: the reference model is loaded without the overrides of spec.model.config, so it "
                "would be another model: leave beta out, train an adapter (spec.peft), or write the overrides into the "
                "model's own config.json",
            )
        )


def check_loss(config: TrainingConfig, findings: Findings) -> None:
    """See that CISPO's bound is not the other losses': TRL falls back to `epsilon`, which would clip any rise."""
    if config.args.get("loss_type") == "cispo" and config.args.get("epsilon_high") is None:
        findings.warnings.append(
            "spec.grpo.args.epsilon_high is not set, and loss_type cispo takes it for the greatest importance ratio "
            "itself, not for a distance from 1: with the default of epsilon, 0.2, every token that matters is scaled "
            "down to it. ScaleRL, whose loss it is, recommends 5.0"
        )


def warn_of_unseen_weights(args: GRPOConfig | None, findings: Findings) -> None:
    """Say where TRL does not log what tells that vLLM generates with the weights that are trained."""
    if args is not None and args.use_vllm and not args.vllm_importance_sampling_correction:
        findings.warnings.append(
            "with vllm_importance_sampling_correction: false nobody compares vLLM's log-probabilities with the "
            "trainer's: if vLLM generates with other weights, it is not noticed"
        )


# --- Rewards ---------------------------------------------------------------------------------------------------------


def find_evaluated(config: TrainingConfig, mixture: Mixture, *, environ: Mapping[str, str]) -> str | None:
    """Return the field of the spec whose rows the run generates completions for as it evaluates, if it does."""
    args = training_args(config, environ=environ)
    if mixture.test is None or (args.get("eval_strategy", "no") == "no" and not args.get("eval_on_start")):
        return None
    return _held_out(config)


def check_rewards(
    config: TrainingConfig,
    findings: Findings,
    mixture: Mixture,
    *,
    evaluated: str | None,
    rewards: list[WatchedReward],
) -> None:
    """Look at what the rewards read of the rows; a fraction that is held out has the columns of the others."""
    parts = [("spec.datasets", mixture.train)]
    if evaluated == _EVAL_DATASETS and mixture.test is not None:
        parts.append((evaluated, mixture.test))
    sound = bool(rewards)
    for path, rows in parts:
        complete = check_columns(config, findings, rows, of=path)
        check_contests(config, findings, rows, of=path)
        if sound and complete:  # one that failed on the first rows would fail on the others too
            sound = try_own_rewards(config, findings, rows, of=path, rewards=rewards)


def _held_out(config: TrainingConfig) -> str:
    return _EVAL_DATASETS if config.spec.eval_datasets else "spec.testFraction"


# --- Prompts ---------------------------------------------------------------------------------------------------------


def check_prompts(
    config: TrainingConfig,
    outcome: Outcome,
    mixture: Mixture,
    *,
    evaluated: str | None,
    model: KnownModel,
    environ: Mapping[str, str],
) -> int | None:
    """Look at every prompt, and at the first and the longest ones as tokens; return the tokens of the longest.

    That is the longest one to train on. Those of the field `evaluated` must have room in the model as well.
    """
    findings, layout = outcome.findings, mixture.report.layout
    scan = scan_rows(mixture.train, layout, path="spec.datasets", need_assistant=False)
    faults = list(scan.problems)
    scans = {"spec.datasets": (mixture.train, scan)}
    if mixture.test is not None:
        path = _held_out(config)
        scans[path] = mixture.test, scan_rows(mixture.test, layout, path=path, need_assistant=False)
        faults += scans[path][1].problems
    for fault in faults:
        findings.add(fault)
    tokenizer = model.tokenizer
    if faults or tokenizer is None:
        return None
    args = training_args(config, environ=environ)
    with findings.collect():
        first = [
            _tokenize(prompt, tokenizer=tokenizer, args=args)
            for prompt in mixture.train[PROMPT][: min(SHOWN_ROWS, len(mixture.train))]
        ]
        longest = {
            path: _longest(*scans[path], tokenizer=tokenizer, args=args)
            for path in ("spec.datasets", evaluated)
            if path is not None
        }
        outcome.samples = [_sample(ids, tokenizer=tokenizer) for ids in first]
        outcome.estimates["longest prompt"] = f"{longest['spec.datasets']:,} tokens"
        completion = args.get("max_completion_length", 512)
        for path, tokens in longest.items():
            _judge_length(
                findings, tokens, of=path, limit=model.number("max_position_embeddings"), completion=completion
            )
        path = max(longest, key=lambda path: longest[path])
        _judge_engine_length(findings, longest[path], *_engine_limit(config, args), of=path, completion=completion)
        return longest["spec.datasets"]
    return None


def _longest(rows: Dataset, scan: Scan, *, tokenizer: Any, args: Mapping[str, Any]) -> int:
    """Return the tokens of the longest prompt, which is looked for among those with the most characters."""
    order = sorted(range(len(rows)), key=lambda index: scan.characters[index], reverse=True)
    few = order[:_LONGEST_ROWS]
    return max(len(_tokenize(rows[index][PROMPT], tokenizer=tokenizer, args=args)) for index in few)


def _tokenize(prompt: Any, *, tokenizer: Any, args: Mapping[str, Any]) -> list[int]:
    """Return a prompt's tokens as GRPOTrainer makes them (trl/trainer/grpo_trainer.py, _tokenize_prompts)."""
    import jinja2

    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    try:
        ids = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **(args.get("chat_template_kwargs") or {}),
        )
    except jinja2.TemplateError as error:
        raise refuse(
            "ConfigInvalid",
            f"spec.model.chatTemplate: the template (or the tokenizer's own) fails on a prompt: {error}",
        ) from error
    return ids


def _sample(ids: list[int], *, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode(ids)
    return {
        "text": text,
        "ids": ids,
        "mask": [0] * len(ids),
        "tokens": len(ids),
        "trained_tokens": 0,
        "tokens_cut": 0,
        "segments": [{"text": text, "trained": False}],
    }


def _judge_length(findings: Findings, longest: int, *, of: str, limit: int | None, completion: int | None) -> None:
    if limit is None:
        return
    if longest >= limit:
        findings.add(
            Problem(
                "DatasetRowsInvalid",
                f"{of}: the longest prompt has {longest:,} tokens, and the model sees {limit:,} "
                "(max_position_embeddings): leave such rows out of the data, or take a model that sees more",
            )
        )
    elif completion is not None and longest + completion > limit:
        findings.warnings.append(
            f"the longest prompt of {of} ({longest:,} tokens) and max_completion_length {completion:,} are together "
            f"more than the {limit:,} tokens that the model sees: lower spec.grpo.args.max_completion_length"
        )


def _engine_limit(config: TrainingConfig, args: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return the field that bounds prompt and completion together in vLLM, and its value."""
    servers = config.spec.rollout_servers
    if servers is None:
        return "spec.grpo.args.vllm_max_model_length", args.get("vllm_max_model_length")
    return "spec.grpo.rollout.server.maxModelLength", servers.max_model_length


def _judge_engine_length(
    findings: Findings, longest: int, path: str, limit: int | None, *, of: str, completion: int | None
) -> None:
    """vLLM refuses a prompt beyond its limit at the step that has it, and ends completions there without a word."""
    needed = longest + (completion or 0)
    if limit is not None and needed > limit:
        findings.add(
            Problem(
                "ConfigInvalid",
                f"{path}: {limit:,} tokens are fewer than the longest prompt of {of} "
                f"({longest:,}) and max_completion_length ({completion or 0:,}) have together: write at least "
                f"{needed:,}, or leave it out",
            )
        )


# --- Forecast --------------------------------------------------------------------------------------------------------


def forecast_rollouts(config: TrainingConfig, outcome: Outcome, args: GRPOConfig, *, prompts: int) -> None:
    """Add rollouts and steps to the estimates (TRL 1.16, RepeatSampler; transformers 5.23, trainer.py:2487)."""
    groups = count_groups(config.args, world_size=config.gang.world_size)
    if groups is None:
        return
    of_a_rollout = groups.of_all // groups.num_generations
    rollouts = prompts // of_a_rollout
    if rollouts == 0:
        outcome.findings.add(
            Problem(
                "BatchNotDivisible",
                f"a rollout takes {of_a_rollout} prompts ({groups.of_all} completions, {groups.num_generations} of "
                f"each prompt), and the data has {prompts}: lower spec.grpo.args.per_device_train_batch_size or "
                "gradient_accumulation_steps, or add data",
            )
        )
        return
    batches = rollouts * groups.steps_per_generation * args.num_iterations
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    outcome.estimates |= {
        "prompts": f"{prompts:,}",
        "completions of a rollout": f"{groups.of_all:,}, of {of_a_rollout:,} prompts",
        "steps per epoch": f"{per_epoch:,}",
        "steps": f"{steps:,}",
        "epochs": f"{steps / per_epoch:g}",
    }
