"""What prepare looks at for supervised fine-tuning: every row, the first ones as TRL prepares them, steps and memory.

It owns the order of these checks; it must not load anything.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.arguments import training_args
from posttrain_workloads.data import Mixture, load_mixture
from posttrain_workloads.forecast import forecast_memory, forecast_steps
from posttrain_workloads.formats import scan_rows, shape_for_sft
from posttrain_workloads.outcome import KnownModel, Outcome
from posttrain_workloads.problems import Problem
from posttrain_workloads.samples import Rendered, judge_rows, render, to_json
from posttrain_workloads.sources import describe

if TYPE_CHECKING:
    from trl import SFTConfig

# With eval_strategy and nothing to evaluate no trainer can be built; it is told of, and the rest still looked at.
_WITHOUT_EVALUATION: Mapping[str, Any] = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
}


def check_sft(
    config: TrainingConfig,
    outcome: Outcome,
    *,
    args: SFTConfig | None,
    model: KnownModel,
    environ: Mapping[str, str],
) -> None:
    """Look at the rows, and forecast steps and memory, as far as there is what that takes."""
    mixture: Mixture | None = None
    with outcome.findings.collect():
        mixture = load_mixture(config, shape=functools.partial(shape_for_sft, config), environ=environ)
    if mixture is None:
        return
    rendered = check_rows(config, outcome, mixture, args=args, tokenizer=model.tokenizer, environ=environ)
    if args is None:
        return
    sequences, length = forecast_steps(
        config, outcome.findings, outcome.estimates, args, mixture.train, rendered=rendered
    )
    if model.parameters is not None and config.gang.gpus_per_node:
        forecast_memory(
            config,
            outcome.findings,
            outcome.estimates,
            args,
            shape=model.shape,
            parameters=model.parameters,
            sequences=sequences,
            length=length,
        )


def check_rows(
    config: TrainingConfig,
    outcome: Outcome,
    mixture: Mixture,
    *,
    args: SFTConfig | None,
    tokenizer: Any | None,
    environ: Mapping[str, str],
) -> Rendered | None:
    """Look at every row, and at the first ones as TRL prepares them, as far as there is what that takes."""
    findings, layout = outcome.findings, mixture.report.layout
    wanted = training_args(config, environ=environ)
    need_assistant = bool(wanted.get("assistant_only_loss"))
    scan = scan_rows(mixture.train, layout, path="spec.datasets", need_assistant=need_assistant)
    faults = list(scan.problems)
    if mixture.test is not None:
        path = "spec.evalDatasets" if config.spec.eval_datasets else "spec.testFraction"
        faults += scan_rows(mixture.test, layout, path=path, need_assistant=need_assistant).problems
    if wanted.get("eval_strategy", "no") != "no" and mixture.test is None:
        wanted |= _WITHOUT_EVALUATION
        findings.add(
            Problem(
                "ConfigInvalid",
                "spec.sft.args.eval_strategy: there is nothing to evaluate on: set spec.evalDatasets or "
                "spec.testFraction, or leave eval_strategy out",
            )
        )
    if tokenizer is not None and layout.conversational and not tokenizer.chat_template:
        faults.append(
            Problem(
                "ChatTemplateMissing",
                f"spec.datasets holds {layout}, and the tokenizer of {describe(config.model)} has no chat template to "
                "render them with: set spec.model.chatTemplate (and spec.model.eosToken to the token it ends a turn "
                "with)",
            )
        )
    for fault in faults:
        findings.add(fault)
    if faults or tokenizer is None or args is None:
        return None
    with findings.collect():
        rendered = render(mixture.train, mixture.test, tokenizer=tokenizer, args=wanted, characters=scan.characters)
        outcome.samples = to_json(rendered, tokenizer=tokenizer, max_length=args.max_length)
        problems, warnings = judge_rows(rendered, max_length=args.max_length, packing=args.packing, tokenizer=tokenizer)
        findings.warnings += warnings
        for problem in problems:
            findings.add(problem)
        return rendered
    return None
