"""A run's own Python code: entry points, and the callbacks built from them.

It owns how `module:Name` becomes an object and what is said when it does not; it must not know what the object is for.
"""

from __future__ import annotations

import importlib
from typing import Any

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.problems import InvalidInputs, Problem, last_lines, refuse

_REASON = "CodeImportFailed"


def load_entry_point(text: str, *, path: str = "spec.code") -> Any:
    """Return the object that `module:Name` stands for; `path` is where the spec names it.

    Raises:
        InvalidInputs: the module does not import, or has no such name.
    """
    module_name, _, name = text.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise refuse(
                _REASON,
                f"{path}: there is no module {error.name} for {text}: spec.code must hold {error.name}.py at its top",
            ) from error
        raise _does_not_import(text, error, path=path) from error
    except (Exception, SystemExit) as error:  # own code: whatever it raises is the answer
        raise _does_not_import(text, error, path=path) from error
    if name not in vars(module):
        public = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))) or "nothing"
        raise refuse(_REASON, f"{path}: module {module_name} has no {name}; it defines {public}")
    return vars(module)[name]


def build_callbacks(config: TrainingConfig) -> list[Any]:
    """Return the callbacks of spec.callbacks, in their order.

    Raises:
        InvalidInputs: every callback that does not import, cannot be built, or is no TrainerCallback.
    """
    from transformers import TrainerCallback

    callbacks = []
    problems: list[Problem] = []
    for index, callback in enumerate(config.spec.callbacks):
        path = f"spec.callbacks[{index}]"
        try:
            build = load_entry_point(callback.function, path=f"{path}.function")
            try:
                built = build(**callback.params)
            except Exception as error:  # own code: whatever it raises is the answer
                raise refuse(
                    _REASON,
                    f"{path}: {callback.function} cannot be built with params {dict(callback.params)}:\n"
                    f"{last_lines(error, skip=__file__)}",
                ) from error
            if not isinstance(built, TrainerCallback):
                raise refuse(
                    _REASON,
                    f"{path}: {callback.function} gives a {type(built).__name__}, and the trainer takes instances of "
                    "transformers.TrainerCallback: derive the class from it",
                )
            callbacks.append(built)
        except InvalidInputs as error:
            problems += error.problems
    if problems:
        raise InvalidInputs(problems)
    return callbacks


def load_trainer_class(config: TrainingConfig) -> Any:
    """Return the spec's trainerClass, or TRL's own class of the method.

    Raises:
        InvalidInputs: it does not import, or is no subclass of TRL's.
    """
    from trl import GRPOTrainer, SFTTrainer

    base = SFTTrainer if config.method == "sft" else GRPOTrainer
    text = config.spec.training.trainer_class
    if text is None:
        return base
    path = f"spec.{config.method}.trainerClass"
    found = load_entry_point(text, path=path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise refuse(_REASON, f"{path}: {text} is not a subclass of trl.{base.__name__}: derive the class from it")
    return found


def _does_not_import(text: str, error: BaseException, *, path: str) -> InvalidInputs:
    return refuse(_REASON, f"{path}: {text} does not import:\n{last_lines(error, skip=__file__)}")
