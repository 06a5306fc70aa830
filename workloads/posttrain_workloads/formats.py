"""The formats of training data: messages, prompt and completion, text; how each is told and made uniform.

It owns which columns a format has and what its rows must look like; it must not load anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.problems import Problem, refuse

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["messages", "prompt-completion", "text", "prompt"]
Shape = Literal["messages", "sharegpt", "text", "other"]

ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's `from` to chat templates' `role`."""

# TRL reads these beside any conversation (trl/trainer/sft_trainer.py, tokenize_fn).
_BESIDE = ("tools", "chat_template_kwargs")
# Columns by whose mere presence TRL would take the data for another format, or for images.
_CONFUSING = frozenset({"messages", "prompt", "completion", "chosen", "rejected", "conversations", "image", "images"})
_LOOK_AT_MOST = 100
_BATCH = 1000
_EXCERPT = 120


@dataclass(frozen=True)
class Layout:
    """A format, and the columns that it stands in."""

    format: Format
    columns: tuple[str, ...]
    shape: Shape
    """What the columns hold."""

    @property
    def conversational(self) -> bool:
        """Whether a chat template is needed."""
        return self.shape in ("messages", "sharegpt")

    def __str__(self) -> str:
        kind = "conversations" if self.conversational else "text"
        return f"{kind} in {' and '.join(self.columns)}"


def shape_for_sft(config: TrainingConfig, rows: Dataset, path: str) -> tuple[Layout, Dataset]:
    """Return a member's layout and its rows in the columns that SFTTrainer takes.

    Raises:
        InvalidInputs: as `decide_layout` and `normalise`.
    """
    layout = decide_layout(rows, path=path, text_field=str(config.args.get("dataset_text_field", "text")))
    keep_others = config.spec.training.trainer_class is not None
    return layout, normalise(rows, layout, path=path, system_prompt=config.spec.system_prompt, keep_others=keep_others)


def decide_layout(rows: Dataset, *, path: str, text_field: str) -> Layout:
    """Return the layout of a member's rows, decided by its columns.

    Raises:
        InvalidInputs: no format fits; the message lists the columns and what would do.
    """
    shapes = {column: shape_of(rows, column) for column in rows.column_names}
    if shapes.get("messages") in ("messages", "sharegpt"):
        return Layout("messages", ("messages",), shapes["messages"])
    if "prompt" in shapes and "completion" in shapes:
        pair = (shapes["prompt"], shapes["completion"])
        if pair in (("text", "text"), ("messages", "messages")):
            return Layout("prompt-completion", ("prompt", "completion"), pair[0])
        raise refuse(
            "DatasetColumnMissing",
            f"{path}: prompt and completion must both be text or both lists of messages with role and content; here "
            f"they are {in_words(pair[0])} and {in_words(pair[1])}{_say_numbers(rows, ('prompt', 'completion'))}",
        )
    if shapes.get("conversations") == "messages":
        return Layout("messages", ("conversations",), "messages")
    sharegpt = [column for column, shape in shapes.items() if shape == "sharegpt"]
    if len(sharegpt) == 1:
        return Layout("messages", (sharegpt[0],), "sharegpt")
    if shapes.get(text_field) == "text":
        return Layout("text", (text_field,), "text")
    raise refuse("DatasetColumnMissing", f"{path}: {_explain_columns(shapes, sharegpt, text_field=text_field)}")


def normalise(rows: Dataset, layout: Layout, *, path: str, system_prompt: str | None, keep_others: bool) -> Dataset:
    """Return the rows in TRL's own columns, every conversation with a system message where one is asked for.

    Other columns are left out, because TRL would take some of them for another format; own trainer classes
    (`keep_others`) get the rest.

    Raises:
        InvalidInputs: a role is not known, or a system prompt is to stand before plain text.
    """
    if system_prompt is not None and not layout.conversational:
        raise refuse(
            "ConfigInvalid",
            f"spec.systemPrompt: {path} holds {layout}, and only conversations have a system message: leave it out, "
            "or write the prompt as messages",
        )
    used = {*layout.columns, *_BESIDE}
    kept = [c for c in rows.column_names if c in used or (keep_others and c not in _CONFUSING)]
    rows = rows.select_columns(kept)
    column = layout.columns[0]
    if layout.shape != "sharegpt" and system_prompt is None:
        return rows.rename_columns({column: "messages"}) if column == "conversations" else rows
    target = "messages" if layout.format == "messages" else "prompt"
    return rows.map(
        _normalise_row,
        fn_kwargs={
            "column": column,
            "target": target,
            "sharegpt": layout.shape == "sharegpt",
            "system": system_prompt,
            "path": path,
        },
        remove_columns=[column] if column != target else None,
        desc=f"Normalising {path}",
    )


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over normalised rows found."""

    problems: tuple[Problem, ...]
    characters: tuple[int, ...]
    """Length of each row's text."""


def scan_rows(rows: Dataset, layout: Layout, *, path: str, need_assistant: bool) -> Scan:
    """Look at every row; each kind of fault becomes one problem, with its first example and how many there are."""
    columns = ("messages",) if layout.format == "messages" else layout.columns
    faults: dict[str, tuple[str, int]] = {}
    characters = []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for values in zip(*(batch[column] for column in columns), strict=True):
            length = 0
            for column, value in zip(columns, values, strict=True):
                fault = _fault_of_conversation(value) if layout.conversational else _fault_of_text(value)
                if fault is None:
                    length += _count_characters(value)
                    if need_assistant and column != "prompt" and not _has_assistant(value):
                        fault = "no turn of the assistant, which assistant_only_loss learns from"
                if fault is not None:
                    key = f"{column}: {fault}"
                    example, count = faults.get(key, (repr(value)[:_EXCERPT], 0))
                    faults[key] = (example, count + 1)
            characters.append(length)
    problems = tuple(
        Problem(
            "DatasetRowsInvalid",
            f"{path}: {count} of {len(rows)} rows are not fit to train on. Column {fault}. The first one: {example}. "
            "Mend or remove these rows",
        )
        for fault, (example, count) in faults.items()
    )
    return Scan(problems=problems, characters=tuple(characters))


# --- Looking at columns ----------------------------------------------------------------------------------------------


def shape_of(rows: Dataset, column: str) -> Shape:
    """Tell what a column holds from its first value that is not empty."""
    for value in rows[:_LOOK_AT_MOST][column]:
        if isinstance(value, str):
            return "text"
        if isinstance(value, list) and value:
            first = value[0]
            if not isinstance(first, dict):
                return "other"
            if "role" in first:
                return "messages"
            return "sharegpt" if {"from", "value"} <= first.keys() else "other"
        if value:
            return "other"
    return "other"


def _explain_columns(shapes: Mapping[str, Shape], sharegpt: list[str], *, text_field: str) -> str:
    found = ", ".join(f"{column} ({in_words(shape)})" for column, shape in shapes.items())
    text = f"no format fits the columns {found}. "
    if len(sharegpt) > 1:
        return f"{text}Several hold conversations: select one of {', '.join(sharegpt)} with columns"
    conversations = [column for column, shape in shapes.items() if shape == "messages"]
    if conversations:
        return f"{text}Rename the conversations: rename: {{{conversations[0]}: messages}}"
    texts = [column for column, shape in shapes.items() if shape == "text"]
    if len(texts) > 1:
        example = f"rename: {{{texts[0]}: prompt, {texts[1]}: completion}}"
        text = f"{text}For instance write {example}. "
    return (
        f"{text}What would do: `messages` (a list of role and content), `conversations` (from and value), `prompt` "
        f"with `completion`, or `{text_field}`"
    )


def _say_numbers(rows: Dataset, columns: tuple[str, ...]) -> str:
    """Return what to do about columns of numbers, into which a reader of CSV turns the text of numbers."""
    numeric = [column for column in columns if isinstance(rows[0][column], int | float)]
    if not numeric:
        return ""
    return f". {' and '.join(numeric)} holds numbers: write JSON Lines with its values in quotes (CSV has no types)"


def in_words(shape: Shape) -> str:
    """Return what a column holds."""
    return {"messages": "role/content", "sharegpt": "from/value", "text": "text", "other": "something else"}[shape]


# --- Rows ------------------------------------------------------------------------------------------------------------


def _normalise_row(
    row: dict[str, Any], *, column: str, target: str, sharegpt: bool, system: str | None, path: str
) -> dict[str, Any]:
    messages = row[column] or []
    if sharegpt:
        messages = [{"role": _role(turn["from"], path=path), "content": turn["value"]} for turn in messages]
    if system is not None and not any(message["role"] in ("system", "developer") for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return {target: messages}


def _role(name: str, *, path: str) -> str:
    try:
        return ROLES[name]
    except KeyError:
        raise refuse(
            "DatasetRowsInvalid",
            f"{path}: a turn is from {name!r}, and the known ones are {', '.join(ROLES)}: convert the data to "
            "messages with role and content",
        ) from None


def _fault_of_conversation(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "a conversation without messages"
    for message in value:
        if not message.get("role"):
            return "a message without role"
        if message.get("content") is None and not message.get("tool_calls"):
            return "a message without content"
    return None


def _fault_of_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "no text"


def _count_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(len(message["content"]) for message in value if isinstance(message.get("content"), str))


def _has_assistant(value: Any) -> bool:
    return any(message["role"] == "assistant" for message in value)
