"""The checks and downloads before any GPU is held; launch starts it.

    python -m posttrain_workloads.launch prepare

It owns which checks there are, in which order, and that all problems are told at once. It must not need a GPU, nor
start training. On success it leaves a Result with reason `Prepared` in the runtime folder, which launch reports: among
its artifacts the model, and every Hub source as `hf://org/name@<commit>` by its key; on failure an error file, as a
rank does. Into the storage it writes samples.json and effective_args.json; below HF_HOME it leaves model and data.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.api.reasons import advice_for
from posttrain.contract import environment
from posttrain.contract.config import HubSource, MountedSource, ResolvedSource, TrainingConfig
from posttrain.contract.facts import PhaseChanged, PrepareResult
from posttrain.contract.result import ExitCode, Result
from posttrain_workloads import estimate, hub
from posttrain_workloads.arguments import sft_args
from posttrain_workloads.data import Mixture, load_mixture
from posttrain_workloads.failures import explain_failure
from posttrain_workloads.forecast import forecast_memory, forecast_steps
from posttrain_workloads.formats import scan_rows
from posttrain_workloads.model import (
    check_files,
    check_tokenizer_files,
    load_model_config,
    load_tokenizer,
    model_folder,
    weight_files,
)
from posttrain_workloads.owncode import build_callbacks, load_trainer_class
from posttrain_workloads.packages import find_missing_packages
from posttrain_workloads.problems import Findings, InvalidInputs, Problem
from posttrain_workloads.reporting import open_reporter
from posttrain_workloads.runtime import Runtime, die_with_parent
from posttrain_workloads.samples import Rendered, judge_rows, name_key, render, to_json
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


@dataclass
class Outcome:
    """Everything that was found."""

    findings: Findings = field(default_factory=Findings)
    commits: dict[str, str] = field(default_factory=dict)
    """Hub commits by source: `model`, `datasets/0`, `evalDatasets/0`."""
    estimates: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    effective_args: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    """URIs of what was resolved, by source: the starting model always, and every source on the Hub."""


def main() -> None:
    """Prepare the run that the environment names; leave the result, or the error file and its exit code."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    runtime = Runtime.of(os.environ)
    try:
        import datasets

        datasets.disable_progress_bars()
        config = TrainingConfig.from_json(Path(os.environ[environment.CONFIG]).read_text())
        reporter = open_reporter(environ=os.environ, attempt=config.attempt, source="prepare")
        reporter.beat(phase="preparing")
        reporter.send(PhaseChanged(phase="preparing"))
        outcome = prepare(config, environ=os.environ)
        say(outcome)
        failure = InvalidInputs(outcome.findings.problems) if outcome.findings.problems else None
        # What another try may mend is no finding: a later one must not meet the problems of an earlier one.
        if failure is None or failure.exit_code != ExitCode.TRANSIENT:
            reporter.send(build_fact(outcome))
        reporter.close()
        if failure is not None:
            raise failure
        write_files(outcome, storage=Path(os.environ[environment.STORAGE]))
        runtime.write_result(build_result(config, outcome))
    except BaseException as error:  # as in a rank: launch judges by what is left behind
        if not isinstance(error, InvalidInputs):
            traceback.print_exc()
        explained = explain_failure(error)
        runtime.write_error(explained, rank=0)
        sys.stderr.flush()
        sys.exit(explained.exit_code)


def prepare(config: TrainingConfig, *, environ: Mapping[str, str]) -> Outcome:
    """Check a run's inputs and fetch them; return all that was found."""
    outcome = Outcome()
    findings = outcome.findings
    config = resolve_revisions(config, outcome, environ=environ)
    if not checks_wanted(config):
        return outcome
    for problem in find_missing_packages(config.spec, config.args):
        findings.add(problem)
    with findings.collect():
        build_callbacks(config)
    with findings.collect():
        load_trainer_class(config)
    args = build_effective_args(config, outcome, environ=environ)
    parameters, tokenizer = check_model(config, findings, environ=environ)
    mixture = check_data(config, findings, environ=environ)
    if mixture is not None:
        rendered = check_rows(config, outcome, mixture, args=args, tokenizer=tokenizer, environ=environ)
        if args is not None:
            sequences, length = forecast_steps(
                config, findings, outcome.estimates, args, mixture.train, rendered=rendered
            )
            if parameters is not None and config.gang.gpus_per_node:
                shape = json.loads((model_folder(config, environ=environ, weights=False) / "config.json").read_text())
                forecast_memory(
                    config,
                    findings,
                    outcome.estimates,
                    args,
                    shape=shape,
                    parameters=parameters,
                    sequences=sequences,
                    length=length,
                )
    if isinstance(config.model, HubSource) and not findings.problems:
        with findings.collect():
            hub.fetch_model(config.model.repo, config.model.revision, path="spec.model")
    return outcome


def checks_wanted(config: TrainingConfig) -> bool:
    """Tell whether more is wanted than the commits of moving revisions."""
    return config.spec.prepare.enabled or config.spec.prepare.dry_run


# --- The Hub ---------------------------------------------------------------------------------------------------------


def resolve_revisions(config: TrainingConfig, outcome: Outcome, *, environ: Mapping[str, str]) -> TrainingConfig:
    """Return the config with every Hub revision replaced by its commit, as far as that is known."""
    keyed: dict[str, ResolvedSource] = {"model": config.model}
    keyed |= {f"datasets/{index}": source for index, source in enumerate(config.datasets)}
    keyed |= {f"evalDatasets/{index}": source for index, source in enumerate(config.eval_datasets)}
    if any(isinstance(source, HubSource) for source in keyed.values()):
        with outcome.findings.collect():
            hub.check_token(environ=environ)
    resolved = dict(keyed)
    for key, source in keyed.items():
        if isinstance(source, HubSource):
            field_name, _, index = key.partition("/")
            with outcome.findings.collect():
                commit = hub.resolve_commit(
                    source.repo,
                    source.revision,
                    kind="model" if key == "model" else "dataset",
                    path=f"spec.{field_name}[{index}]" if index else f"spec.{field_name}",
                )
                outcome.commits[key] = commit
                resolved[key] = source.model_copy(update={"revision": commit})
                outcome.artifacts[key] = f"hf://{source.repo}@{commit}"
    if isinstance(config.model, MountedSource):
        outcome.artifacts["model"] = describe(config.model)
    return config.model_copy(
        update={
            "model": resolved["model"],
            "datasets": tuple(resolved[f"datasets/{index}"] for index in range(len(config.datasets))),
            "eval_datasets": tuple(resolved[f"evalDatasets/{index}"] for index in range(len(config.eval_datasets))),
        }
    )


# --- Model, data, arguments ------------------------------------------------------------------------------------------


def check_model(
    config: TrainingConfig, findings: Findings, *, environ: Mapping[str, str]
) -> tuple[int | None, Any | None]:
    """Return the number of parameters and the tokenizer, as far as they are to be had; the weights are not fetched."""
    source = describe(config.model)
    try:
        folder = model_folder(config, environ=environ, weights=False)
        if isinstance(config.model, HubSource):
            names = hub.list_files(config.model.repo, config.model.revision, path="spec.model")
        else:
            names = [file.name for file in folder.iterdir()]
    except InvalidInputs as error:
        for problem in error.problems:
            findings.add(problem)
        return None, None
    parameters = tokenizer = None
    with findings.collect():
        check_files(names, source=source)
        load_model_config(config, environ=environ)
        if isinstance(config.model, HubSource):
            parameters = hub.count_remote_parameters(config.model.repo, config.model.revision, path="spec.model")
        else:
            parameters = estimate.count_parameters(weight_files(folder))
    with findings.collect():
        check_tokenizer_files(names, source=source)
        tokenizer = load_tokenizer(config, environ=environ)
    return parameters, tokenizer


def check_data(config: TrainingConfig, findings: Findings, *, environ: Mapping[str, str]) -> Mixture | None:
    """Return the mixture, or None where there is none to be had."""
    with findings.collect():
        return load_mixture(config, environ=environ)
    return None


def build_effective_args(config: TrainingConfig, outcome: Outcome, *, environ: Mapping[str, str]) -> SFTConfig | None:
    """Build the real SFTConfig, as far as that can be done without the run's GPUs, and keep every key of it."""
    import transformers
    from trl import SFTConfig

    transformers.utils.logging.set_verbosity_error()
    wanted = sft_args(config, environ=environ)
    here: dict[str, Any] = {"ddp_backend": None}
    if config.gang.gpus_per_node:
        here |= {"use_cpu": True, "tf32": None}
    with outcome.findings.collect():
        try:
            args = SFTConfig(**{**wanted, **here})
        except (ValueError, TypeError, KeyError) as error:
            text = str(error)
            raise InvalidInputs([Problem("ConfigInvalid", f"{name_key(text, config.args)}: {text}")]) from error
        kept = {**args.to_dict(), **{key: wanted.get(key) for key in here}}
        outcome.effective_args = {key: _plain(value) for key, value in kept.items() if not key.endswith("_token")}
        if wanted.get("eos_token"):
            outcome.effective_args["eos_token"] = wanted["eos_token"]
        return args
    return None


# --- Rows ------------------------------------------------------------------------------------------------------------


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
    wanted = sft_args(config, environ=environ)
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


# --- What comes of it ------------------------------------------------------------------------------------------------


def build_fact(outcome: Outcome) -> PrepareResult:
    """Return the fact that tells of all findings."""
    return PrepareResult(
        problems=tuple(str(problem) for problem in outcome.findings.problems),
        warnings=tuple(outcome.findings.warnings),
        commits=outcome.commits,
        estimates=outcome.estimates,
    )


def build_result(config: TrainingConfig, outcome: Outcome) -> Result:
    """Return the result of a preparation without problems."""
    warnings = len(outcome.findings.warnings)
    remarks = f" with {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    checked = f"all checks passed{remarks}, and the inputs are fetched"
    return Result(
        reason="Prepared",
        message=checked if checks_wanted(config) else "revisions are resolved; nothing else was checked",
        advice=advice_for("Prepared"),
        metrics=outcome.estimates,
        artifacts=outcome.artifacts,
    )


def write_files(outcome: Outcome, *, storage: Path) -> None:
    """Leave samples.json and effective_args.json in the storage."""
    for name, content in (("samples.json", outcome.samples), ("effective_args.json", outcome.effective_args)):
        if content:
            (storage / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def say(outcome: Outcome) -> None:
    """Print the findings for whoever reads the log."""
    for name, value in outcome.estimates.items():
        print(f"{name}: {value}")
    for warning in outcome.findings.warnings:
        print(f"warning: {warning}")
    for problem in outcome.findings.problems:
        print(f"problem: {problem}", file=sys.stderr)
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Return a value of SFTConfig as JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


if __name__ == "__main__":
    main()
