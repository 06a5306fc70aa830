"""A run's own rollout function: loaded, called as TRL calls it, what it returns judged; and what it generates with.

    from posttrain_workloads.own_rollouts import generate, tokenize

    def answer_twice(prompts, trainer):
        prompt_ids = tokenize(trainer, prompts)
        completion_ids, logprobs = generate(trainer, prompt_ids)
        ...
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": ...}

It owns what such a function may return and what is said of anything else; it must not know how completions are made.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.api.spelling import join_names
from posttrain.contract.config import TrainingConfig
from posttrain.contract.result import ExitCode
from posttrain_workloads import _compat
from posttrain_workloads.own_environments import PATH, REASON, raise_named, watch_environment
from posttrain_workloads.owncode import load_entry_point
from posttrain_workloads.problems import refuse
from posttrain_workloads.prompts import RESERVED
from posttrain_workloads.runtime import RankFailure

ENVIRONMENT = "environment_factory"
_PROMPTS, _COMPLETIONS, _LOGPROBS, _MASK = "prompt_ids", "completion_ids", "logprobs", "env_mask"
_TRLS = (_PROMPTS, _COMPLETIONS, _LOGPROBS)

Tokens = list[list[int]]


# --- For rollout functions -------------------------------------------------------------------------------------------


def tokenize(trainer: Any, prompts: list[Any]) -> Tokens:
    """Return the tokens of prompts, texts or conversations, as the trainer itself would make them."""
    return _compat.tokenize_prompts(trainer, prompts)


def generate(trainer: Any, prompt_ids: Tokens) -> tuple[Tokens, list[list[float | None]] | None]:
    """Return a completion of each prompt by the run's rollout mode, and the log-probabilities of its tokens.

    They are None where transformers generates. Each call yields at most `max_completion_length` tokens a completion.
    Ranks generate together: each of them makes as many calls, and with as many prompts, as the others.
    """
    return _compat.generate_tokens(trainer, prompt_ids)


# --- For the trainer -------------------------------------------------------------------------------------------------


def load_rollouts(config: TrainingConfig) -> dict[str, Any]:
    """Return what TRL's trainer is given for its rollouts; nothing where the model completes each prompt once.

    Raises:
        InvalidInputs: it does not import, or cannot be called as TRL calls it.
    """
    assert config.spec.grpo is not None
    name = config.spec.grpo.rollout_function
    if name is None:
        return {}
    found = load_entry_point(name, path=PATH)
    if inspect.isclass(found):
        return {ENVIRONMENT: watch_environment(name, found, config)}
    if not callable(found):
        what = f"of type {type(found).__name__}"
        message = f"{name} is {what}, and it takes a function of prompts and trainer, or a class of environments"
        raise refuse("CodeImportFailed", f"{PATH}: {message}")
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(found.__call__):
        message = "is async def, and the trainer does not await it: write def, with asyncio.run inside"
        raise refuse("CodeImportFailed", f"{PATH}: {name} {message}")
    try:
        inspect.signature(found).bind([], None)
    except (TypeError, ValueError) as error:
        raise refuse("CodeImportFailed", f"{PATH}: the trainer calls {name}(prompts, trainer): {error}") from error
    return {"rollout_func": RolloutFunction(name, found)}


@dataclass(frozen=True)
class RolloutFunction:
    """An own rollout function in TRL's signature, which TRL is kept from misunderstanding."""

    name: str
    """As the spec has it."""
    function: Callable[[list[Any], Any], Any]

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return prompts and completions as tokens, and a list with an entry a completion for each further field.

        Raises:
            RankFailure: the function fails, or returns anything else.
        """
        try:
            returned = self.function(prompts, trainer)
        except Exception as error:  # own code: whatever it raises is the answer
            raise_named(error, f"{self.name} fails on {len(prompts)} prompts", skip=__file__)
        try:
            return _check_rollout(
                returned,
                prompts=len(prompts),
                vocabulary=trainer.model.config.get_text_config().vocab_size,
                compared=trainer.use_vllm and trainer.vllm_importance_sampling_correction,
            )
        except _Unusable as error:
            raise RankFailure(REASON, f"{PATH}: {self.name} returns {error}", exit_code=ExitCode.INVALID) from None


class _Unusable(Exception):
    """What is wrong with a rollout, as the end of a sentence."""


def _check_rollout(returned: Any, *, prompts: int, vocabulary: int, compared: bool) -> dict[str, Any]:
    """Return the rollout in the types that TRL takes; `compared` where it needs log-probabilities.

    TRL 1.16 looks only for its three keys (trl/trainer/grpo_trainer.py, _generate). Whatever else is wrong ends in an
    error that names neither the function nor the key, and a further field that is too short is left out without one.
    """
    if not isinstance(returned, Mapping):
        raise _Unusable(f"a {type(returned).__name__}: it must return a dict with {join_names(_TRLS)}")
    missing = [key for key in _TRLS if key not in returned]
    if missing:
        there = join_names([str(key) for key in returned]) if returned else "nothing"
        raise _Unusable(f"no {join_names(missing)}, but {there}: it must return a dict with {join_names(_TRLS)}")
    rollout: dict[str, Any] = {}
    for key, value in returned.items():
        if key in RESERVED - {_COMPLETIONS}:
            raise _Unusable(f"{key}, which rewards get from elsewhere: give the field another name")
        if key == _LOGPROBS and value is None:
            rollout[key] = None
            continue
        if not isinstance(value, list | tuple):
            raise _Unusable(f"a {type(value).__name__} as {key}: it must be a list with an entry for each prompt")
        if len(value) != prompts:
            message = f"{len(value)} {key} for {prompts} prompts"
            raise _Unusable(f"{message}: one for each, since a prompt is there as often as it is to be completed")
        rollout[key] = list(value)
    for key in (_PROMPTS, _COMPLETIONS):
        rollout[key] = [
            _tokens(ids, name=f"{key}[{row}]", vocabulary=vocabulary) for row, ids in enumerate(rollout[key])
        ]
    if rollout[_LOGPROBS] is not None:
        rollout[_LOGPROBS] = list(_beside(rollout, _LOGPROBS, _log_probability))
    elif compared:
        raise _Unusable(
            "no logprobs, with which the trainer corrects what vLLM samples otherwise than it would itself: return "
            "those that `generate` gives, or set vllm_importance_sampling_correction: false"
        )
    if _MASK in rollout:
        rollout[_MASK] = list(_beside(rollout, _MASK, _bit))
    return rollout


def _tokens(ids: Any, *, name: str, vocabulary: int) -> list[int]:
    tokens = [_number(token, operator.index, name=name, wanted="token ids") for token in _items(ids, name=name)]
    if not tokens:
        raise _Unusable(f"nothing in {name}: there must be a token at least, the end of the turn for instance")
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise _Unusable(f"{token} in {name}, and the model has the tokens 0 to {vocabulary - 1:,}")
    return tokens


def _beside(rollout: Mapping[str, Any], key: str, convert: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Yield the values of a field that has one for each token of the completions."""
    wanted = {_LOGPROBS: "the log-probability of the sampled token", _MASK: "1, or 0 for a token not from the model"}
    for row, (values, completion) in enumerate(zip(rollout[key], rollout[_COMPLETIONS], strict=True)):
        name = f"{key}[{row}]"
        converted = [_number(value, convert, name=name, wanted=wanted[key]) for value in _items(values, name=name)]
        if len(converted) != len(completion):
            message = f"{len(converted)} values in {name} for the {len(completion)} tokens of {_COMPLETIONS}[{row}]"
            raise _Unusable(f"{message}: one for each, {wanted[key]}")
        yield converted


def _items(values: Any, *, name: str) -> Iterable[Any]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise _Unusable(f"a {type(values).__name__} as {name}: it must be a list")
    return values


def _number(value: Any, convert: Callable[[Any], Any], *, name: str, wanted: str) -> Any:
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise _Unusable(f"{value!r} in {name}: it takes {wanted}") from None


def _log_probability(value: Any) -> float | None:
    """Return a number; vLLM has none for some tokens."""
    return None if value is None else float(value)


def _bit(value: Any) -> int:
    bit = operator.index(value)
    if bit not in (0, 1):
        raise ValueError
    return bit
