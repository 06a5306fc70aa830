"""FSDP's environment, as accelerate reads it.

It owns the variables and which settings a user may give; it must not know how they reach the trainer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from pydantic import JsonValue

from posttrain.api.execution import Parallelism
from posttrain.errors import Problem


def _is_flag(value: JsonValue) -> bool:
    return isinstance(value, bool)


def _is_count(value: JsonValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: JsonValue) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _is_policy(value: JsonValue) -> bool:
    return value in ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")


_FLAG = (_is_flag, "true or false")
_SETTINGS: dict[str, tuple[Callable[[JsonValue], bool], str]] = {
    "activation_checkpointing": _FLAG,
    "activation_checkpointing_offload": _FLAG,
    "auto_wrap_policy": (_is_policy, "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP"),
    "cpu_ram_efficient_loading": _FLAG,
    "min_num_params": (_is_count, "a whole number"),
    "reshard_after_forward": _FLAG,
    "transformer_cls_to_wrap": (_is_names, "a list of class names"),
}

_OWNED = {
    "version": "posttrain uses FSDP2",
    "offload_params": "set spec.parallelism.offload",
    "state_dict_type": "it is FULL_STATE_DICT: with another one the trained model has no weights",
}


def build_fsdp_environment(parallelism: Parallelism) -> dict[str, str]:
    """Return the variables from which accelerate builds its FSDP plugin (accelerate 1.15, dataclasses.py:1825-2060)."""
    settings: dict[str, JsonValue] = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": True,
        "reshard_after_forward": True,
        **(parallelism.config or {}),
        "version": 2,
        "offload_params": parallelism.offload == "Full",
        "state_dict_type": "FULL_STATE_DICT",
    }
    variables = {f"FSDP_{key.upper()}": _text(value) for key, value in sorted(settings.items())}
    return {"ACCELERATE_USE_FSDP": "true", **variables}


def find_fsdp_problems(parallelism: Parallelism) -> list[Problem]:
    """Return what is wrong with the user's FSDP settings."""
    return [
        Problem(path=f"spec.parallelism.config.{key}", message=message)
        for key, message in _explain(parallelism.config or {}).items()
    ]


def _explain(settings: Mapping[str, JsonValue]) -> dict[str, str]:
    messages = {}
    for key, value in settings.items():
        if key in _OWNED:
            messages[key] = f"is set by posttrain: {_OWNED[key]}"
        elif key not in _SETTINGS:
            near = difflib.get_close_matches(key, _SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_SETTINGS)}"
            messages[key] = f"is no setting of FSDP: {hint}"
        elif not _SETTINGS[key][0](value):
            messages[key] = f"must be {_SETTINGS[key][1]}"
    return messages


def _text(value: JsonValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)
