"""Completions of a logged step with their rewards, as a Parquet file in the run's storage.

    python -m posttrain_workloads.completions FILE

prints one as JSON, for those who have no reader of Parquet. It owns the file's name and columns; it must not import
torch, nor know a trainer.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.contract.completions import completions_file

KEPT = 64
"""Completions of one step that are kept: the first groups."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What one rollout gave, of all ranks: lists of equal length, a group's completions one after the other."""

    prompts: Sequence[Any]
    """Texts, or lists of messages."""
    completions: Sequence[Any]
    rewards: Mapping[str, Sequence[float]]
    """By reward; not a number where it could not score."""
    advantages: Sequence[float]
    weights: Sequence[str] | None
    """The version of the weights that vLLM generated each with; None where the trainer's own model did."""


def write_completions(completions: Completions, *, storage: Path, step: int) -> None:
    """Write the first completions of a step, whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {
        "prompt": [to_text(prompt) for prompt in completions.prompts[:KEPT]],
        "completion": [to_text(completion) for completion in completions.completions[:KEPT]],
        **{
            f"reward/{name}": [None if math.isnan(value) else value for value in values[:KEPT]]
            for name, values in completions.rewards.items()
        },
        "advantage": list(completions.advantages[:KEPT]),
        **({"weights": list(completions.weights[:KEPT])} if completions.weights is not None else {}),
    }
    file = storage / completions_file(step)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    parquet.write_table(pa.table(columns), temporary)
    temporary.replace(file)


def read_completions(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def to_text(value: Any) -> str:
    """Return a prompt or completion as text: a single message's content, or each message after its role."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in value)


def main() -> None:
    """Print the file that the command line names."""
    print(json.dumps(read_completions(Path(sys.argv[1])), ensure_ascii=False))


if __name__ == "__main__":
    main()
