"""Run many preparations, and load many mixtures, in one process of the trainer's environment.

    python prepare_cases.py CASES.json OUT.json

CASES is a list of `{name, what, config, storage, code, environ, endpoint}`, `what` a key of RUN; OUT maps each name to
what was found. One process, because importing TRL is slow.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    cases, out = (Path(argument) for argument in sys.argv[1:])
    import datasets
    import huggingface_hub.constants

    datasets.disable_progress_bars()
    home = huggingface_hub.constants.ENDPOINT
    answers = {}
    for case in json.loads(cases.read_text()):
        huggingface_hub.constants.ENDPOINT = case.get("endpoint") or home
        os.environ.pop("HF_TOKEN", None)
        os.environ |= case.get("environ", {})
        sys.path[:0] = [case["code"]] if case.get("code") else []
        answers[case["name"]] = RUN[case["what"]](case)
    out.write_text(json.dumps(answers))


def run_prepare(case: dict[str, Any]) -> dict[str, Any]:
    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads.outcome import build_fact, build_result
    from posttrain_workloads.prepare import prepare

    config = TrainingConfig.from_json(json.dumps(case["config"]))
    outcome = prepare(config, environ=environ_of(case))
    return {
        **build_fact(outcome).model_dump(mode="json"),
        "result": build_result(config, outcome).model_dump(mode="json"),
        "samples": outcome.samples,
        "effective_args": outcome.effective_args,
    }


def run_args(case: dict[str, Any]) -> dict[str, Any]:
    """Build the arguments alone, as prepare does."""
    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads.outcome import Outcome
    from posttrain_workloads.prepare import build_effective_args

    outcome = Outcome()
    build_effective_args(TrainingConfig.from_json(json.dumps(case["config"])), outcome, environ=environ_of(case))
    return {
        "problems": [str(problem) for problem in outcome.findings.problems],
        "effective_args": outcome.effective_args,
    }


def run_data(case: dict[str, Any]) -> dict[str, Any]:
    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.formats import shape_for_sft
    from posttrain_workloads.problems import InvalidInputs

    config = TrainingConfig.from_json(json.dumps(case["config"]))
    try:
        shape = functools.partial(shape_for_sft, config)
        mixture = load_mixture(config, shape=shape, environ=environ_of(case))
    except InvalidInputs as error:
        return {"problems": [str(problem) for problem in error.problems]}
    return {
        "problems": [],
        "train": mixture.train.to_list(),
        "test": mixture.test.to_list() if mixture.test is not None else None,
        "layout": str(mixture.report.layout),
        "members": [[member.path, member.rows, member.used] for member in mixture.report.members],
    }


def run_model(case: dict[str, Any]) -> dict[str, Any]:
    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads.model import build_peft_config, load_model, load_tokenizer
    from posttrain_workloads.problems import InvalidInputs

    config = TrainingConfig.from_json(json.dumps(case["config"]))
    try:
        model = load_model(config, environ=environ_of(case))
        tokenizer = load_tokenizer(config, environ=environ_of(case))
    except InvalidInputs as error:
        return {"problems": [str(problem) for problem in error.problems]}
    adapter = build_peft_config(config)
    return {
        "problems": [],
        "dtype": str(model.dtype),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "attention": model.config._attn_implementation,
        "eos_token": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template,
        "adapter": None
        if adapter is None
        else [adapter.r, adapter.lora_alpha, adapter.lora_dropout, str(adapter.target_modules)],
    }


def run_activations(case: dict[str, Any]) -> dict[str, Any]:
    """Count what autograd keeps in one forward pass over a padded batch, and estimate the same."""
    import torch

    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads.estimate import Setup, estimate, read_architecture
    from posttrain_workloads.model import load_model

    batch, length = 4, 96
    model = load_model(TrainingConfig.from_json(json.dumps(case["config"])), environ=environ_of(case))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones((batch, length), dtype=torch.long)
    mask[0, -5:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.ones_like(mask), attention_mask=mask).last_hidden_state.sum()
    architecture = read_architecture(model.config.to_dict())
    assert architecture is not None
    attention = model.config._attn_implementation
    setup = Setup(
        architecture=architecture,
        parameters=architecture.parameters,
        weight_bytes=4,
        mixed_precision=False,
        batch=batch,
        length=length,
        checkpointing=False,
        attention=attention,
    )
    return {
        "kept": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        "estimated": estimate(setup).parts["activations"],
        "parameters": model.num_parameters(),
        "parameters_of_shape": architecture.parameters,
    }


def environ_of(case: dict[str, Any]) -> dict[str, str]:
    return {
        **os.environ,
        "POSTTRAIN_STORAGE": case["storage"],
        "POSTTRAIN_MOUNT_FILES": "/",
    }


RUN = {"prepare": run_prepare, "args": run_args, "data": run_data, "model": run_model, "activations": run_activations}

if __name__ == "__main__":
    main()
