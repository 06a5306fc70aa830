"""`posttrain samples`: what it shows of a step's completions, and what it says where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.completions import completions_file
from posttrain.errors import UserError
from posttrain.local.completions import read_completions, read_completions_on_claim, render_completions
from posttrain.local.state import RunFolder
from tests.support.builders import build_run

GRPO: dict[str, Any] = {"sft": None, "grpo": {"args": {"num_generations": 8}, "rewards": [{"name": "accuracy"}]}}


def row(prompt: str, completion: str, advantage: float, **rewards: float | None) -> dict[str, Any]:
    scores = {f"reward/{name}": value for name, value in rewards.items()}
    return {"prompt": prompt, "completion": completion, "advantage": advantage, **scores}


def test_completions_stand_under_their_prompt_the_best_first() -> None:
    rows = [
        row("2 + 2 =", "5", -0.5, accuracy=0.0, length=None),
        row("3 + 3 =", "6", 0.0, accuracy=1.0, length=0.25),
        row("2 + 2 =", "It is\n4", 0.5, accuracy=1.0, length=-0.12345),
    ]

    assert render_completions(rows, step=7).splitlines() == [
        "Step 7: 3 completions",
        "",
        "> 2 + 2 =",
        "",
        "  [accuracy 1, length -0.123; advantage +0.5]",
        "  It is",
        "  4",
        "",
        "  [accuracy 0, length none; advantage -0.5]",
        "  5",
        "",
        "> 3 + 3 =",
        "",
        "  [accuracy 1, length 0.25; advantage +0]",
        "  6",
    ]


@pytest.mark.parametrize(
    ("spec", "kept", "says"),
    [
        ({}, (), "demo has no completions: only runs with grpo generate any"),
        (GRPO, (), "demo has no completions: it has logged no step yet"),
        (GRPO, (5, 10), "demo has no completions of step 7; there are 2 steps, from 5 to 10"),
    ],
)
def test_a_step_of_which_nothing_is_kept_is_refused(
    tmp_path: Path, spec: dict[str, Any], kept: tuple[int, ...], says: str
) -> None:
    folder = RunFolder(tmp_path / "demo")
    for step in kept:
        file = folder.storage / completions_file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    with pytest.raises(UserError) as refused:
        read_completions(build_run(**spec), folder=folder, step=7, cache=tmp_path / "cache")

    assert str(refused.value).startswith(says)


def test_a_folder_that_is_no_claim_of_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_completions_on_claim("demo", claim=tmp_path, step=None, cache=tmp_path / "cache")

    assert str(refused.value) == (
        f"demo has no completions: there is no {tmp_path}/demo/completions. --claim takes the folder where the run's "
        "claim is mounted"
    )
