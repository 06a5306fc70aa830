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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.contract import environment
from posttrain.contract.config import HubSource, MountedSource, ResolvedSource, TrainingConfig
from posttrain.contract.facts import PhaseChanged
from posttrain.contract.result import ExitCode
from posttrain_workloads import hub
from posttrain_workloads.arguments import make_args, training_args
from posttrain_workloads.failures import explain_failure
from posttrain_workloads.grpo_checks import check_grpo
from posttrain_workloads.model import (
    check_files,
    check_target_modules,
    check_tokenizer_files,
    count_parameters,
    load_model_config,
    load_tokenizer,
    model_folder,
)
from posttrain_workloads.outcome import KnownModel, Outcome, build_fact, build_result, checks_wanted, say, write_files
from posttrain_workloads.owncode import build_callbacks, load_trainer_class
from posttrain_workloads.packages import find_missing_packages
from posttrain_workloads.problems import Findings, InvalidInputs, refuse
from posttrain_workloads.reporting import open_reporter
from posttrain_workloads.runtime import Runtime, die_with_parent
from posttrain_workloads.samples import name_key
from posttrain_workloads.sft_checks import check_sft
from posttrain_workloads.sources import describe

if TYPE_CHECKING:
    pass


def main() -> None:
    """Prepare the run that the environment names; leave the result, or the error file and its exit code."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    runtime = Runtime.of(os.environ)
    try:
        import datasets

        datasets.disable_progress_bars()
        config = TrainingConfig.from_json(Path(os.environ[environment.CONFIG]).read_text())
        reporter = open_reporter(config, environ=os.environ, source="prepare")
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
    model = check_model(config, findings, environ=environ)
    check = check_sft if config.method == "sft" else check_grpo
    check(config, outcome, args=args, model=model, environ=environ)
    if isinstance(config.model, HubSource) and not findings.problems:
        with findings.collect():
            hub.fetch_model(config.model.repo, config.model.revision, path="spec.model")
    return outcome


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


def check_model(config: TrainingConfig, findings: Findings, *, environ: Mapping[str, str]) -> KnownModel:
    """Return what is to be had of the model without its weights, which are not fetched."""
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
        return KnownModel()
    parameters = tokenizer = None
    shape: dict[str, Any] = {}
    own_names: Mapping[str, str] = {}
    with findings.collect():
        check_files(names, source=source)
        own_names = load_model_config(config, environ=environ).get_text_config(decoder=True).attribute_map
        shape = json.loads((folder / "config.json").read_text()) | (config.spec.model.config or {})
        if isinstance(config.model, HubSource):
            parameters = hub.count_remote_parameters(config.model.repo, config.model.revision, path="spec.model")
        else:
            parameters = count_parameters(folder, source=source)
    if shape:
        with findings.collect():
            check_target_modules(config, environ=environ)
    with findings.collect():
        check_tokenizer_files(names, source=source)
        tokenizer = load_tokenizer(config, environ=environ)
    return KnownModel(parameters=parameters, tokenizer=tokenizer, shape=shape, own_names=own_names)


def build_effective_args(config: TrainingConfig, outcome: Outcome, *, environ: Mapping[str, str]) -> Any | None:
    """Build TRL's own arguments, as far as that can be done without the run's GPUs, and keep every key of them."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    wanted = training_args(config, environ=environ)
    here: dict[str, Any] = {"ddp_backend": None}
    if config.gang.gpus_per_node:
        here |= {"use_cpu": True, "tf32": None}
    with outcome.findings.collect():
        try:
            args = make_args(config, {**wanted, **here}, ranks=config.gang.world_size)
        except (ValueError, TypeError, KeyError) as error:
            key = name_key(str(error), config.args, method=config.method)
            raise refuse("ConfigInvalid", f"{key}: {error}") from error
        kept = {**args.to_dict(), **{key: wanted.get(key) for key in here}}
        outcome.effective_args = {key: _plain(value) for key, value in kept.items() if not key.endswith("_token")}
        if wanted.get("eos_token"):
            outcome.effective_args["eos_token"] = wanted["eos_token"]
        with outcome.findings.collect():
            check_schedule(args, path=f"spec.{config.method}.args")
        return args
    return None


def check_schedule(args: Any, *, path: str) -> None:
    """Build the schedule of the learning rate, which a trainer does only when it begins; `path` is where args stand.

    Raises:
        InvalidInputs: torch refuses the learning rate, or transformers what the schedule is given.
    """
    import torch
    from transformers import get_scheduler

    key = "learning_rate"
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        key = "lr_scheduler_kwargs"
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise refuse(
            "ConfigInvalid", f"{path}.{key}: lr_scheduler_type {args.lr_scheduler_type.value}: {error}"
        ) from error


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
