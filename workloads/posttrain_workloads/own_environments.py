"""A run's own environment: a class whose methods the model calls as tools, as TRL's trainer takes it.

It owns what is seen to before a run of such a class, and what is said of one that fails; it must not call a tool.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, NoReturn

from posttrain.contract.config import TrainingConfig
from posttrain.contract.result import ExitCode
from posttrain_workloads.failures import UNKNOWN, explain_failure
from posttrain_workloads.problems import last_lines, refuse
from posttrain_workloads.runtime import RankFailure

REASON = "RolloutFunctionFailed"
PATH = "spec.grpo.rolloutFunction"
_NO_TOOLS = frozenset({"reset", "get_reward"})


def watch_environment(name: str, kind: type[Any], config: TrainingConfig) -> type[Any]:
    """Return the class, with the begin of its episodes watched: what fails there is told with its name.

    Raises:
        InvalidInputs: it has no such begin, or ranks would wait for each other for ever.
    """
    if "reset" not in dict(inspect.getmembers(kind, inspect.isfunction)):
        message = f"{name} is a class without a method reset, which begins an episode: write one, or name a function"
        raise refuse("CodeImportFailed", f"{PATH}: {message}")
    together = _what_generates_together(config)
    if together is not None:
        message = (
            f"{name} is a class of environments: TRL generates on a rank as often as its completions call tools, and "
            f"with {together} the ranks generate together, and would wait for each other: name a function, which can "
            "see to that, or take strategy DDP with rollouts inside each rank"
        )
        raise refuse("ConfigInvalid", f"{PATH}: {message}")

    class Watched(kind):  # type: ignore[misc]
        def reset(self, **row: Any) -> Any:
            try:
                begun = super().reset(**row)
            except Exception as error:  # own code: whatever it raises is the answer
                raise_named(error, f"{name}.reset fails", skip=__file__)
            if begun is not None and not isinstance(begun, str | list):
                message = f"{name}.reset returns a {type(begun).__name__}: it takes None, or text to add to the prompt"
                raise RankFailure(REASON, f"{PATH}: {message}", exit_code=ExitCode.INVALID)
            return begun

    Watched.__name__ = kind.__name__  # by which TRL names the metrics of its rewards
    return Watched


def raise_named(error: Exception, what: str, *, skip: str) -> NoReturn:
    """Raise what own code failed with as `what` fails, without the frames of file `skip`; a known failure as it is."""
    if explain_failure(error).reason != UNKNOWN:
        raise error
    raise RankFailure(REASON, f"{PATH}: {what}:\n{last_lines(error, skip=skip)}") from error


def check_environment(kind: type[Any], tokenizer: Any) -> None:
    """See that an environment can be made, and that the model can be shown its tools.

    Raises:
        InvalidInputs: not so.
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )

    name = kind.__name__
    try:
        environment = kind()
    except Exception as error:  # own code: whatever it raises is the answer
        message = f"{name}() cannot be made:\n{last_lines(error, skip=__file__)}"
        raise refuse("CodeImportFailed", f"{PATH}: {message}") from error
    for method, function in inspect.getmembers(environment, inspect.ismethod):
        if method.startswith("_") or method in _NO_TOOLS:
            continue
        try:
            get_json_schema(function)
        except (DocstringParsingException, TypeHintParsingException) as error:
            message = f"{name}.{method} cannot be shown to the model as a tool: {error}"
            raise refuse("CodeImportFailed", f"{PATH}: {message}") from error
    fix = "name one of TRL's in spec.model.chatTemplate (the folder chat_templates of its package), or name a function"
    if not supports_tool_calling(tokenizer):
        raise refuse("ConfigInvalid", f"{PATH}: the model's chat template knows no tools: {fix}")
    try:
        known = copy.deepcopy(tokenizer)
        if known.response_template is None:
            known = add_response_schema(known)
        if not is_chat_template_prefix_preserving(known):
            get_training_chat_template(known)
    except ValueError as error:
        raise refuse(
            "ConfigInvalid", f"{PATH}: TRL cannot read tool calls of the chat template: {error} Or {fix}"
        ) from error


def _what_generates_together(config: TrainingConfig) -> str | None:
    """Return what makes a rank's generation wait for the others', in words of the spec."""
    assert config.spec.grpo is not None
    if config.gang.world_size == 1:
        return None
    if config.spec.parallelism.strategy in ("ZeRO3", "FSDP"):
        return f"spec.parallelism.strategy: {config.spec.parallelism.strategy}"
    mode = config.spec.grpo.rollout.mode
    if mode not in ("Transformers", "Colocate"):
        return f"spec.grpo.rollout.mode: {mode}"
    size = config.args.get("vllm_tensor_parallel_size", 1)
    return f"vllm_tensor_parallel_size: {size}" if mode == "Colocate" and size != 1 else None
