"""Rewards that look at the text of a completion alone: its form, its steps, its repetitions, its length in tokens.

It owns one plain function a reward, in TRL's signature, with the parameters of the table (posttrain.api.rewards); it
must not grade what an answer says.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

from posttrain_workloads.rewards.completions import Completion, text_of

_FORMAT = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
_STEP = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,", re.MULTILINE)
_ENOUGH_STEPS = 3


def format(
    prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """Return 1.0 for each completion in the format of DeepSeek-R1 with its line breaks, else 0.0."""
    return [float(_FORMAT.match(text_of(completion)) is not None) for completion in completions]


def tag_count(
    prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """Return a quarter for each tag that stands exactly once."""
    texts = [text_of(completion) for completion in completions]
    return [sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS) for text in texts]


def reasoning_steps(
    prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """Return a third for each sign of a step, at most 1.0.

    open-r1 counts a number only at the begin of the text; here on each line.
    """
    counts = [len(_STEP.findall(text_of(completion))) for completion in completions]
    return [min(1.0, count / _ENOUGH_STEPS) for count in counts]


def repetition_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    language: str = "en",
    **columns: Any,
) -> list[float | None]:
    """Return `max_penalty` times the share of n-grams that are not the first of their kind (arXiv:2502.03373, B.6)."""
    split = _split_chinese if language == "zh" else _split_at_blanks
    rewards: list[float | None] = []
    for completion in completions:
        words = split(text_of(completion))
        ngrams = list(zip(*(itertools.islice(words, at, None) for at in range(ngram_size)), strict=False))
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        rewards.append(repeated * max_penalty if repeated else 0.0)
    return rewards


def code_format(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    default_language: str = "python",
    language: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 for each completion in the format of `format` with a block of code in its answer, else 0.0.

    The block is marked with the row's `language`, where the dataset has such a column, else with `default_language`
    (the parameter `language` of the resource).
    """
    languages = [name or default_language for name in language or [None] * len(completions)]
    return [
        float(_code_pattern(name).match(text_of(completion)) is not None)
        for completion, name in zip(completions, languages, strict=True)
    ]


def soft_overlong_punishment(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_len: int = 16384,
    soft_punish_cache: int = 4096,
    **columns: Any,
) -> list[float | None]:
    """Return the penalty of DAPO for the number of tokens of each completion (arXiv:2503.14476, equation 13)."""
    begin = max_completion_len - soft_punish_cache
    counts = [len(ids) for ids in completion_ids]
    return [
        0.0 if count <= begin else -1.0 if count > max_completion_len else (begin - count) / soft_punish_cache
        for count in counts
    ]


def _split_at_blanks(text: str) -> list[str]:
    return text.lower().split()


def _split_chinese(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel("WARNING")  # else it tells on standard error how it loads its dictionary
    return list(jieba.cut(text))


@functools.cache
def _code_pattern(language: str) -> re.Pattern[str]:
    block = rf"```{re.escape(language)}.*?```"
    return re.compile(rf"^<think>\n.*?\n</think>\n<answer>\n.*?{block}.*?\n</answer>$", re.DOTALL | re.MULTILINE)
