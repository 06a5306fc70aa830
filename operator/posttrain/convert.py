"""From a recipe of open-r1 or TRL (the YAML file of an SFT or GRPO script) to a TrainingRun.

It owns what each key of such a recipe becomes, and why a key becomes nothing; it must not read or write files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.api.args import ArgsTable, check_args
from posttrain.api.base import API_VERSION
from posttrain.api.methods import args_path, table_of
from posttrain.api.spelling import join_names, nearest, write_value
from posttrain.api.training_run import KIND, Method
from posttrain.api.validate import parse_training_run
from posttrain.recipe import Recipe, UnusableRecipe, write_decimal
from posttrain.recipe_rewards import PARAMS, take_rewards

STRATEGIES = {"ddp": "DDP", "zero1": "ZeRO1", "zero2": "ZeRO2", "zero3": "ZeRO3", "fsdp": "FSDP"}
"""Names of accelerate configurations, as open-r1 has them, and the strategy of each."""

_GPUS_OF_ACCELERATE = 8
_TRACKERS = {"wandb": "WandB", "trackio": "Trackio", "mlflow": "MLflow", "tensorboard": "TensorBoard"}
_ONLY_IN_GRPO = frozenset(
    {"reward_funcs", "reward_weights", "num_generations", "max_completion_length", "use_vllm", "dataset_prompt_column"}
    | PARAMS.keys()
)

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_seq_length": "max_length",
    "use_liger": "use_liger_kernel",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "warmup_ratio": "warmup_steps",
}
_HUB = "publishing to the Hub is not supported yet: upload the trained model's folder"
_QUANTIZATION = "posttrain's QLoRA is in 4-bit NF4 with nested quantization: there is nothing to set"
_ADAPTER = "spec.peft has method, rank, alpha, dropout and targetModules only"
_DROPPED = {
    "benchmarks": "evaluation is not supported yet: evaluate the trained model's folder",
    "bnb_4bit_quant_storage": _QUANTIZATION,
    "bnb_4bit_quant_type": _QUANTIZATION,
    "dataset_streaming": "data is fetched before any GPU is held, and not streamed",
    "gradient_checkpointing_use_reentrant": "write activation_checkpointing_kwargs among the args",
    "ignore_bias_buffers": "it has no effect in current TRL",
    "load_in_8bit": "training on a base in 8 bits is not supported; QLoRA (4 bits) is",
    "lora_modules_to_save": _ADAPTER,
    "lora_target_parameters": _ADAPTER,
    "lora_task_type": "it is CAUSAL_LM",
    "use_bnb_nested_quant": _QUANTIZATION,
    "use_dora": _ADAPTER,
    "use_rslora": _ADAPTER,
}
_SANDBOX = "programs out of completions run in posttrain's own sandbox; spec.grpo.sandbox names another one"
_DROPPED_OF: Mapping[Method, Mapping[str, str]] = {
    "sft": {
        "num_completions_to_print": "it belongs to GRPO",
        "system_prompt": "open-r1 uses it in SFT for benchmarks only, and trains without it; to train with a system "
        "message, write spec.systemPrompt",
        "wandb_log_unique_prompts": "it belongs to GRPO",
    },
    "grpo": {
        "code_provider": _SANDBOX,
        "e2b_router_url": _SANDBOX,
        "ioi_provider": _SANDBOX,
        "morph_router_url": _SANDBOX,
        "parallel_code_exec_per_proc": "spec.grpo.sandbox.concurrency says how many programs run at the same time",
    },
}
_NO_VLLM = "use_vllm is not set, so completions come from the trainer's own model"

# What TRL 0.18, the release that open-r1's recipes were last written for, did where a recipe says nothing.
_FORMER_DEFAULTS = {"beta": 0.04, "loss_type": "bnpo", "use_bias_correction_kl": False}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A TrainingRun as data, the keys of the recipe that are not in it, and what a person should know of it."""

    resource: dict[str, Any]
    dropped: tuple[tuple[str, str], ...]
    """Each with why."""
    notes: tuple[str, ...]


def convert_recipe(
    data: Mapping[str, Any], *, name: str, accelerate: str | None = None, gpus: int | None = None
) -> Conversion:
    """Return the TrainingRun named `name` of a recipe; `accelerate` is one of `STRATEGIES`.

    Without `gpus` it has the 8 of open-r1's accelerate configurations, or as many as a run has by default.

    Raises:
        UnusableRecipe: it names no model, no data, or rewards that cannot be told.
        InvalidResource: what came of it is not valid; the problems name fields of the TrainingRun.
    """
    _refuse_unusable(data, accelerate=accelerate)
    method: Method = "grpo" if _ONLY_IN_GRPO & data.keys() else "sft"
    table = table_of(method)
    # An empty key is one that is not set, but for arguments whose default is something: max_length without a limit.
    recipe = Recipe(rest={key: value for key, value in data.items() if value is not None or _says_none(key, table)})
    tracking = _tracking(recipe)
    rollout = _rollout(recipe)
    spec: dict[str, Any] = {
        "model": _model(recipe),
        **_data(recipe),
        **(_prompts(recipe) if method == "grpo" else {}),
        "peft": _peft(recipe),
        "parallelism": {"strategy": STRATEGIES[accelerate.lower()]} if accelerate else None,
        "resources": {"numNodes": 1, "gpusPerNode": gpus or _GPUS_OF_ACCELERATE} if accelerate or gpus else None,
        "checkpoints": _checkpoints(recipe),
        "tracking": tracking,
        method: {
            **({"rewards": take_rewards(recipe)} if method == "grpo" else {}),
            **rollout,
            "args": _args(recipe, table, method=method, uses_vllm=bool(rollout)),
        },
    }
    if accelerate is None and gpus is None:
        recipe.notes.append(
            "a recipe names neither GPUs nor strategy: the run has one GPU and DDP until you set spec.resources and "
            f"spec.parallelism.strategy (or convert with one of {join_names(list(STRATEGIES), conjunction='or')})"
        )
    written = {key: value for key, value in spec.items() if value}
    resource = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": written,
    }
    parse_training_run(resource)
    recipe.notes += _advice(written, method=method, table=table)
    return Conversion(resource=resource, dropped=tuple(recipe.dropped), notes=tuple(recipe.notes))


def _advice(spec: Mapping[str, Any], *, method: Method, table: ArgsTable) -> list[str]:
    """Return what is as in the recipe and still means something else here."""
    notes = []
    attention = spec["model"].get("attnImplementation", "")
    if attention.startswith("flash_attention"):
        notes.append(
            f"spec.model.attnImplementation {attention} needs a package that is not in the trainer image: take sdpa, "
            "or an image of your own in spec.podOverrides.image"
        )
    args = spec[method]["args"]
    if args.get("packing") and "packing_strategy" not in args:
        notes.append(
            "packing: TRL fits whole rows together now, which needs FlashAttention where rows are long; "
            "packing_strategy: wrapped cuts them at max_length, as older releases did"
        )
    if method == "grpo":
        notes += [
            f"{key} is not set: it is {write_value(table.keys[key].default)} by default now, and in TRL 0.18 training "
            f"was with {write_value(former)}"
            for key, former in _FORMER_DEFAULTS.items()
            if key not in args
        ]
    return notes


def _refuse_unusable(data: Mapping[str, Any], *, accelerate: str | None) -> None:
    if not data.get("model_name_or_path"):
        raise UnusableRecipe("model_name_or_path is missing: a recipe names the model it trains")
    if not data.get("dataset_name") and not data.get("dataset_mixture"):
        raise UnusableRecipe("dataset_name and dataset_mixture are missing: a recipe names its data in one of them")
    if accelerate is not None and accelerate.lower() not in STRATEGIES:
        near = nearest(accelerate, STRATEGIES)
        raise UnusableRecipe(
            f"{write_value(accelerate)} is no accelerate configuration that is known here: take "
            f"{near or join_names(list(STRATEGIES), conjunction='or')}"
        )


# --- Model ------------------------------------------------------------------------------------------------------------


def _source(place: str) -> str:
    return f"file://{place}" if place.startswith(("/", "./", "../")) else place


def _model(recipe: Recipe) -> dict[str, Any]:
    model: dict[str, Any] = {"source": _source(str(recipe.take("model_name_or_path")))}
    for key, name in (
        ("model_revision", "revision"),
        ("trust_remote_code", "trustRemoteCode"),
        ("chat_template", "chatTemplate"),
        ("eos_token", "eosToken"),
        ("torch_dtype", "dtype"),
        ("dtype", "dtype"),
        ("attn_implementation", "attnImplementation"),
    ):
        if key in recipe.rest:
            model[name] = recipe.take(key)
    return model


def _peft(recipe: Recipe) -> dict[str, Any] | None:
    wanted = recipe.take("use_peft")
    in_4_bits = recipe.take("load_in_4bit")
    if not wanted:
        for key in [key for key in recipe.rest if key.startswith("lora_")]:
            recipe.drop(key, "use_peft is not set, so all weights are trained")
        if in_4_bits:
            recipe.drop("load_in_4bit", "use_peft is not set, and weights in 4 bits cannot be trained themselves")
        return None
    peft: dict[str, Any] = {"method": "QLoRA" if in_4_bits else "LoRA"}
    for key, name in (("lora_r", "rank"), ("lora_alpha", "alpha")):
        if key in recipe.rest:
            peft[name] = recipe.take(key)
    if "lora_dropout" in recipe.rest:
        peft["dropout"] = write_decimal(recipe.take("lora_dropout"))
    modules = recipe.take("lora_target_modules")
    if modules not in (None, "all-linear", ["all-linear"]):
        peft["targetModules"] = [modules] if isinstance(modules, str) else modules
    return peft


# --- Data -------------------------------------------------------------------------------------------------------------


def _data(recipe: Recipe) -> dict[str, Any]:
    evaluates = recipe.rest.get("eval_strategy", recipe.rest.get("evaluation_strategy", "no")) not in {"no", False}
    mixture = recipe.take("dataset_mixture")
    if mixture is not None:
        for key in ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"):
            if key in recipe.rest:
                recipe.drop(key, "dataset_mixture names the data")
        return _mixture(mixture, recipe, evaluates=evaluates)
    member: dict[str, Any] = {"source": _source(str(recipe.take("dataset_name")))}
    for key, name in (("dataset_config", "config"), ("dataset_train_split", "split")):
        if key in recipe.rest:
            member[name] = recipe.take(key)
    if not evaluates:
        if "dataset_test_split" in recipe.rest:
            recipe.drop("dataset_test_split", "eval_strategy is not set, so nothing is evaluated")
        return {"datasets": [member]}
    held_out = {**member, "split": recipe.take("dataset_test_split") or "test"}
    return {"datasets": [member], "evalDatasets": [held_out]}


def _mixture(mixture: Any, recipe: Recipe, *, evaluates: bool) -> dict[str, Any]:
    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        raise UnusableRecipe("dataset_mixture has no list of datasets: a mixture is {datasets: [{id: org/name}]}")
    data: dict[str, Any] = {
        "datasets": [_member(item, index, recipe) for index, item in enumerate(mixture["datasets"])],
    }
    if mixture.get("seed") is not None:
        data["datasetSeed"] = mixture["seed"]
    share = mixture.get("test_split_size")
    if isinstance(share, int) and not isinstance(share, bool):
        recipe.drop("dataset_mixture.test_split_size", "spec.testFraction is a share, and this is a number of rows")
    elif share is not None:
        data["testFraction"] = write_decimal(share)
    for key in mixture.keys() - {"datasets", "seed", "test_split_size"}:
        recipe.drop(f"dataset_mixture.{key}", "open-r1 knows no such key and ignores it")
    if evaluates and "testFraction" not in data:
        for key in ("eval_strategy", "evaluation_strategy"):
            if key in recipe.rest:
                recipe.drop(
                    key, "the mixture holds nothing out; set spec.testFraction or spec.evalDatasets to evaluate"
                )
    return data


def _member(item: Any, index: int, recipe: Recipe) -> dict[str, Any]:
    if not isinstance(item, dict) or not item.get("id"):
        raise UnusableRecipe(f"dataset_mixture.datasets[{index}] has no id: a member is {{id: org/name}}")
    member: dict[str, Any] = {"source": _source(str(item["id"]))}
    for key in ("config", "split", "columns"):
        if item.get(key) is not None:
            member[key] = item[key]
    weight = item.get("weight")
    if weight is not None and weight != 1:
        member["fraction"] = write_decimal(weight)
    for key in item.keys() - {"id", "config", "split", "columns", "weight"}:
        recipe.drop(f"dataset_mixture.datasets[{index}].{key}", "open-r1 knows no such key and ignores it")
    return member


def _prompts(recipe: Recipe) -> dict[str, Any]:
    return {"promptColumn": recipe.take("dataset_prompt_column"), "systemPrompt": recipe.take("system_prompt")}


def _rollout(recipe: Recipe) -> dict[str, Any]:
    """Return where completions come from; open-r1 had vLLM on GPUs or a node of its own where nothing else was said."""
    mode = recipe.take("vllm_mode")
    if not recipe.take("use_vllm"):
        return {}
    if mode != "colocate":
        recipe.notes.append(
            "use_vllm: the recipe's vLLM is a server of its own, and here it is inside the trainer "
            "(spec.grpo.rollout.mode: Colocate), on the same GPUs"
        )
    return {"rollout": {"mode": "Colocate"}}


# --- Checkpoints and trackers -----------------------------------------------------------------------------------------


def _checkpoints(recipe: Recipe) -> dict[str, Any]:
    checkpoints: dict[str, Any] = {}
    strategy = recipe.take("save_strategy")
    steps = recipe.take("save_steps")
    if strategy not in (None, "steps"):
        recipe.drop("save_strategy", "checkpoints are written every spec.checkpoints.everySteps steps")
        if steps is not None:
            recipe.drop("save_steps", f"save_strategy is {write_value(strategy)}")
    elif isinstance(steps, int) and not isinstance(steps, bool):
        checkpoints["everySteps"] = steps
    elif steps is not None:
        recipe.drop("save_steps", "spec.checkpoints.everySteps is a number of steps, and this is a share of them")
    limit = recipe.take("save_total_limit")
    if limit is not None:
        checkpoints["keepLast"] = limit
    return checkpoints


def _tracking(recipe: Recipe) -> dict[str, Any]:
    given = recipe.take("report_to")
    names = [given] if isinstance(given, str) else list(given or [])
    known = [_TRACKERS[name] for name in names if name in _TRACKERS]
    for name in names:
        if name not in _TRACKERS and name != "none":
            supported = join_names(list(_TRACKERS.values()))
            recipe.drop("report_to", f"{name} is no tracker that is supported ({supported} are)")
    tracking: dict[str, Any] = {"reportTo": known} if known else {}
    for key, name in (("wandb_project", "project"), ("wandb_entity", "entity"), ("wandb_run_group", "group")):
        if key in recipe.rest and "WandB" in known:
            tracking[name] = recipe.take(key)
        elif key in recipe.rest:
            recipe.drop(key, "report_to does not name wandb")
    project = recipe.take("project")
    if project is not None and known:
        tracking.setdefault("project", project)
    elif project is not None:
        recipe.drop("project", "report_to names no tracker")
    if "WandB" in known:
        recipe.notes.append("Weights & Biases needs a key: name a Secret with WANDB_API_KEY in spec.tracking.secretRef")
    return tracking


# --- Everything else --------------------------------------------------------------------------------------------------


def _args(recipe: Recipe, table: ArgsTable, *, method: Method, uses_vllm: bool) -> dict[str, Any]:
    """Return the rest of the recipe as arguments of TRL's class, and drop what is none."""
    args: dict[str, Any] = {}
    for key, value in list(recipe.rest.items()):
        name = _RENAMED.get(key, key)
        why = _why_dropped(key, name, table, method=method, uses_vllm=uses_vllm)
        written = _in_words(name, value)
        if why is None:
            problems = check_args({name: written}, table, path=".".join(args_path(method)))
            why = problems[0].message if problems else None
        if why is None and name != key and name in recipe.rest:
            why = f"{name} is given too"
        if why is not None:
            recipe.drop(key, why)
            continue
        args[name] = written
        if name != key:
            recipe.notes.append(f"{key} is called {name} now")
    return args


def _says_none(key: str, table: ArgsTable) -> bool:
    row = table.keys.get(_RENAMED.get(key, key))
    return row is not None and row.owned is None and row.default is not None


def _in_words(name: str, value: Any) -> Any:
    match name, value:
        case "eval_strategy", False:  # YAML reads a bare `no` as false
            return "no"
        case "scale_rewards", bool():
            return "group" if value else "none"
    return value


def _why_dropped(key: str, name: str, table: ArgsTable, *, method: Method, uses_vllm: bool) -> str | None:
    """Return why a key becomes nothing; None for a key that TRL's class takes from a user."""
    dropped = {**_DROPPED, **_DROPPED_OF[method]}
    if key in dropped:
        return dropped[key]
    if key.startswith("vllm_") and not uses_vllm:
        return _NO_VLLM
    if re.match(r"(hub_|push_to_hub|overwrite_hub)", key) or key == "callbacks":
        return _HUB if key != "callbacks" else f"open-r1's only callback, push_to_hub_revision, publishes: {_HUB}"
    row = table.keys.get(name)
    if row is not None:
        return f"posttrain sets it: {row.owned}" if row.owned is not None else None
    for known in (key, name):
        if known in table.elsewhere:
            return table.elsewhere[known]
    near = nearest(key, table.keys)
    hint = f"; did you mean {near}?" if near else ""
    return f"{table.class_name} (TRL {table.library['trl']}) has no such key, and open-r1's scripts ignore it{hint}"
