"""Write the tables of training arguments that the operator reads in place of TRL.

    python scripts/generate_tables.py

A row a key of TRL's class: type, declared default, whether posttrain sets it itself, whether it is deprecated, one
sentence of help. It owns which keys posttrain sets itself and what to write instead; it must not judge values. Run by
an interpreter without TRL it goes on in the trainer's environment (`posttrain env trainer`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

TABLES = Path(__file__).resolve().parent.parent / "operator" / "posttrain" / "api" / "tables"

_CHECKPOINTS = "posttrain writes, verifies and removes checkpoints itself"
_PARALLELISM = "write spec.parallelism.strategy (and spec.parallelism.config for its details)"
_HUB = "publishing to the Hub is not supported yet: the trained model is a folder, upload that"
_NO_EFFECT = "it has no effect on a TrainingRun: leave it out"

# Keys that posttrain sets itself. The value completes "<key> is set by posttrain: ...".
OWNED = {
    "auto_find_batch_size": "a run keeps its batch size: when memory does not suffice, write a smaller "
    "per_device_train_batch_size and more gradient_accumulation_steps",
    "chat_template_path": "write the template into spec.model.chatTemplate",
    "ddp_backend": "it follows from the resources: NCCL on GPUs, gloo on CPUs",
    "deepspeed": _PARALLELISM,
    "do_eval": f"{_NO_EFFECT}, and write eval_strategy with spec.evalDatasets or spec.testFraction",
    "do_predict": _NO_EFFECT,
    "do_train": _NO_EFFECT,
    "enable_jit_checkpoint": f"{_CHECKPOINTS}, also when a pod is told to end",
    "eos_token": "write spec.model.eosToken",
    "fsdp": _PARALLELISM,
    "fsdp_config": _PARALLELISM,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": "write spec.access.hubTokenSecretRef: a token in a resource can be read by everybody who sees it",
    "load_best_model_at_end": "the trained model is the last one; each kept checkpoint can be taken from the storage",
    "local_rank": "torchrun gives it to each process",
    "logging_nan_inf_filter": "it is off, because on it replaces each NaN by an average and hides it",
    "model_init_kwargs": "write spec.model: dtype, attnImplementation, trustRemoteCode, revision, config",
    "output_dir": "it is a folder in spec.checkpoints.storage",
    "parallelism_config": "write spec.parallelism",
    "project": "write spec.tracking.project",
    "push_to_hub": _HUB,
    "report_to": "write spec.tracking.reportTo",
    "resume_from_checkpoint": "a run goes on from its newest verified checkpoint by itself",
    "save_on_each_node": f"{_CHECKPOINTS}, in a storage that all nodes share",
    "save_only_model": "a restart goes on from a checkpoint, which needs the optimizer's state: leave it out",
    "save_steps": "write spec.checkpoints.everySteps",
    "save_strategy": f"{_CHECKPOINTS}: write spec.checkpoints.everySteps",
    "save_total_limit": "write spec.checkpoints.keepLast",
    "trust_remote_code": "write spec.model.trustRemoteCode",
    "use_cpu": "it follows from spec.resources.gpusPerNode (0 trains on CPUs)",
}

# Keys that TRL or transformers accept with a warning; what to write instead.
DEPRECATED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "label_smoothing_factor": None,
    "pad_token": None,
    "use_liger_kernel": None,
}

# Keys of older releases, of other classes and of open-r1's recipes, which SFTConfig does not have.
ELSEWHERE = {
    "attn_implementation": "write spec.model.attnImplementation",
    "chat_template": "write spec.model.chatTemplate",
    "dataset_config": "write spec.datasets[].config",
    "dataset_mixture": "write spec.datasets",
    "dataset_name": "write spec.datasets[].source",
    "dataset_test_split": "write spec.evalDatasets[].split",
    "dataset_train_split": "write spec.datasets[].split",
    "dtype": "write spec.model.dtype",
    "evaluation_strategy": "it is called eval_strategy now",
    "group_by_length": 'write train_sampling_strategy: "group_by_length"',
    "hub_model_revision": _HUB,
    "load_in_4bit": "write spec.peft.method: QLoRA",
    "logging_dir": "TensorBoard's files lie in the run's storage: leave it out",
    "lora_alpha": "write spec.peft.alpha",
    "lora_dropout": "write spec.peft.dropout",
    "lora_r": "write spec.peft.rank",
    "lora_target_modules": "write spec.peft.targetModules",
    "lr": "it is called learning_rate",
    "max_seq_length": "it is called max_length now",
    "model_name_or_path": "write spec.model.source",
    "model_revision": "write spec.model.revision",
    "no_cuda": OWNED["use_cpu"],
    "overwrite_hub_revision": _HUB,
    "overwrite_output_dir": "every run has a folder of its own: leave it out",
    "push_to_hub_revision": _HUB,
    "system_prompt": "write spec.systemPrompt",
    "tokenizer_name_or_path": "the tokenizer is the model's own: leave it out",
    "torch_dtype": "write spec.model.dtype",
    "use_liger": "it is called use_liger_kernel now",
    "use_peft": "write spec.peft",
    "wandb_entity": "write spec.tracking.entity",
    "wandb_project": "write spec.tracking.project",
    "wandb_run_group": "write spec.tracking.group",
    "warmup_ratio": "write warmup_steps: a value below 1 is a share of all steps",
}

# "The `keep_end` value is deprecated" is about one value, not about the key.
_DEPRECATED_HELP = re.compile(r"\bdeprecated\b(?! value)", re.IGNORECASE)
_DEPRECATED_VALUE = re.compile(r"value is deprecated")
_NOT_ABOUT_THE_KEY = frozenset({"local_rank"})  # it mentions torch.distributed.launch, which is deprecated


def main() -> None:
    """Write every table."""
    if importlib.util.find_spec("trl") is None:
        go_on_in_trainer()
    TABLES.mkdir(exist_ok=True)
    (TABLES / "sft_config.json").write_text(render_sft_config())


def go_on_in_trainer() -> None:
    """Replace this process by the same call in the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    interpreter = output.splitlines()[-1]
    os.execv(interpreter, [interpreter, *sys.argv])


def render_sft_config() -> str:
    """Return the table of trl.SFTConfig as the text of its file."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported by TRL, warns that it looks for one
    from trl import SFTConfig

    rows = build_rows(SFTConfig)
    for name in (*OWNED, *DEPRECATED):
        if name not in rows:
            raise SystemExit(f"{name} is no key of trl.SFTConfig: take it out of {Path(__file__).name}")
    for name in ELSEWHERE:
        if name in rows:
            raise SystemExit(f"{name} is a key of trl.SFTConfig: take it out of ELSEWHERE")
    table = {
        "class": "trl.SFTConfig",
        "library": {name: importlib.metadata.version(name) for name in ("transformers", "trl")},
        "keys": rows,
        "elsewhere": ELSEWHERE,
    }
    return json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def build_rows(config: type[Any]) -> dict[str, dict[str, Any]]:
    """Return a row for each key that `config` takes."""
    from pydantic import TypeAdapter

    hints = get_type_hints(config)
    rows = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        text = field.metadata.get("help") or ""
        if is_said_deprecated(config, field) and field.name not in DEPRECATED:
            raise SystemExit(f"{field.name} is deprecated ({text}): enter it in DEPRECATED with what replaces it")
        schema = TypeAdapter(hints[field.name]).json_schema()
        rows[field.name] = {
            "type": reduce_schema(schema, choices=field.metadata.get("choices"), definitions=schema.get("$defs", {})),
            "default": declared_default(field),
            "owned": OWNED.get(field.name),
            "deprecated": field.name in DEPRECATED,
            "replacement": DEPRECATED.get(field.name),
            "help": first_sentence(text),
        }
    return rows


def is_said_deprecated(config: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Tell whether the help of the key says so, in the class or, where it is overridden there, in a base class."""
    texts = [field.metadata.get("help") or ""]
    for base in config.__mro__[1:]:
        inherited = getattr(base, "__dataclass_fields__", {}).get(field.name)
        if inherited is not None:
            texts.append(inherited.metadata.get("help") or "")
    return field.name not in _NOT_ABOUT_THE_KEY and any(
        _DEPRECATED_HELP.search(text) and not _DEPRECATED_VALUE.search(text) for text in texts
    )


def declared_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default as JSON data."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return json.loads(json.dumps(default))


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, on one line."""
    text = " ".join(text.replace("%%", "%").split()).removeprefix("Deprecated. ")
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`'\"(])", text)[0]


def reduce_schema(schema: dict[str, Any], *, choices: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` in the small language of the tables: type, anyOf, enum, items, additionalProperties."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        members: list[dict[str, Any]] = []
        for part in schema["anyOf"]:
            member = reduce_schema(part, choices=choices, definitions=definitions)
            if member not in members:
                members.append(member)
        # An annotation `SomeEnum | str` takes the names of the members only: the class converts them.
        if any(is_text_enum(member) for member in members):
            members = [member for member in members if member != {"type": "string"}]
        members.sort(key=lambda member: member == {"type": "null"})
        return members[0] if len(members) == 1 else {"anyOf": members}
    if "const" in schema:
        return {"enum": [schema["const"]]}
    if "enum" in schema:
        return {"enum": list(schema["enum"])}
    if schema["type"] == "string" and choices:
        return {"enum": [str(choice) for choice in choices]}
    reduced: dict[str, Any] = {"type": schema["type"]}
    if schema["type"] == "array":
        reduced["items"] = reduce_schema(schema["items"], choices=None, definitions=definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        reduced["additionalProperties"] = reduce_schema(
            schema["additionalProperties"], choices=None, definitions=definitions
        )
    return reduced


def is_text_enum(schema: dict[str, Any]) -> bool:
    """Tell whether `schema` is a choice among strings."""
    return all(isinstance(value, str) for value in schema.get("enum", [0]))


if __name__ == "__main__":
    main()
