"""The prompts of GRPO: the column that holds them becomes `prompt`, text or conversation, and the rest is the rewards'.

It owns what a prompt's column may hold and what stands before it; it must not load anything, nor know a reward.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.formats import Layout, in_words, shape_of
from posttrain_workloads.problems import refuse
from posttrain_workloads.rewards import ROW_COLUMN

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT = "prompt"

RESERVED = frozenset(
    {PROMPT, ROW_COLUMN}
    | {"prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    | {"environment", "environments", "image", "images"}
)
"""Names that no other column can have: ours, those by which TRL itself hands something to a reward
(trl/trainer/grpo_trainer.py, _calculate_rewards), and those by whose mere presence it would take prompts for images."""


def shape_prompts(config: TrainingConfig, rows: Dataset, path: str, *, templated: bool) -> tuple[Layout, Dataset]:
    """Return a member's layout and its rows with the column `prompt`; the other columns are there for the rewards.

    A text is the user's turn of a conversation where the model has a chat template (`templated`), else it is the prompt
    as it stands. Before a conversation that has no system message goes the spec's.

    Raises:
        InvalidInputs: there is no such column, it holds neither text nor messages, or a system prompt is to stand
            before plain text.
    """
    column = config.spec.prompt_column or PROMPT
    _require(rows, column, path=path)
    shape = shape_of(rows, column)
    if shape not in ("text", "messages"):
        raise refuse(
            "DatasetColumnMissing",
            f"{path}: column {column} holds {in_words(shape)}, and a prompt is text or a list of messages with role "
            "and content: name another column in spec.promptColumn",
        )
    conversational = shape == "messages" or templated
    system = config.spec.system_prompt
    if system is not None and not conversational:
        raise refuse(
            "ConfigInvalid",
            f"spec.systemPrompt: {path} holds text, the model has no chat template, and only conversations have a "
            "system message: leave it out, or set spec.model.chatTemplate",
        )
    kept = [name for name in rows.column_names if name == column or name not in RESERVED]
    rows = rows.select_columns(kept)
    if conversational:
        rows = rows.map(
            _converse,
            fn_kwargs={"column": column, "system": system, "text": shape == "text"},
            remove_columns=[column],
            desc=f"Making prompts of {path}",
        )
    elif column != PROMPT:
        rows = rows.rename_columns({column: PROMPT})
    return Layout("prompt", (PROMPT,), "messages" if conversational else "text"), rows


def number_rows(rows: Dataset) -> Dataset:
    """Return the rows with their numbers in a column, by which a reward tells rows with equal prompts apart."""
    return rows.add_column(ROW_COLUMN, list(range(len(rows))))


def _require(rows: Dataset, column: str, *, path: str) -> None:
    if column in rows.column_names:
        return
    near = difflib.get_close_matches(column, rows.column_names, n=1)
    hint = f"did you mean {near[0]}?" if near else "name one of them in spec.promptColumn"
    raise refuse(
        "DatasetColumnMissing",
        f"{path}: there is no column {column} with prompts; the data has {', '.join(rows.column_names)}: {hint}",
    )


def _converse(row: dict[str, Any], *, column: str, system: str | None, text: bool) -> dict[str, Any]:
    value = row[column]
    # An empty value stays one, so that the look at every row finds it.
    messages = ([{"role": "user", "content": value}] if value else []) if text else list(value or [])
    if system is not None and messages and not any(m["role"] in ("system", "developer") for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return {PROMPT: messages}
