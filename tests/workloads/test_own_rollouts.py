"""A run whose completions its own function or environment makes, by `posttrain run`: rightly and wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.api.loader import load_documents
from tests.workloads._command import Command
from tests.workloads._configs import GRPO_ARGS

pytestmark = pytest.mark.workloads

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart" / "turns.yaml"


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, quickstart_inputs: Path):
    """The example with a tiny model and two steps; nothing of it is left at the end."""
    [document] = load_documents(EXAMPLE.read_text(), origin=EXAMPLE.name)
    spec = document.data["spec"]
    spec["model"]["source"] = f"file://{tiny_model}"
    spec["datasets"] = [{"source": f"file://{quickstart_inputs / 'problems.jsonl'}"}]
    spec["code"]["path"] = str(EXAMPLE.with_name("own"))
    spec["grpo"]["args"] |= {**GRPO_ARGS, "max_steps": 2}
    made = Command(folder=tmp_path / "work", spec=spec)
    yield made
    made.end()


def test_completions_of_two_turns_are_trained_on_but_for_what_the_model_did_not_write(command: Command) -> None:
    code, output = command.start().wait()

    assert code == 0, output + command.logs()
    logged = [fact.body.metrics for fact in command.facts() if fact.body.type == "Logged"]
    steps = [{name: float(value) for name, value in metrics.items()} for metrics in logged if "loss" in metrics]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["rewards/early/mean"] == 0.5  # the field of the rollout is there: no answer of noise is right
        assert metrics["completions/max_length"] == 2 * GRPO_ARGS["max_completion_length"]
        assert metrics["rewards/last_number/failed"] == metrics["rewards/early/failed"] == 0
        assert metrics["time/rollout"] > 0
    warned = [fact.body.warnings for fact in command.facts() if fact.body.type == "PrepareResult"]
    assert "TypeError: early() missing 1 required keyword-only argument: 'turns'" in warned[0][0]


def test_a_rollout_that_cannot_be_trained_on_ends_the_run_with_what_to_mend(command: Command) -> None:
    command.spec["code"]["path"] = str(Path(__file__).with_name("own_code"))
    command.spec["grpo"] |= {"rolloutFunction": "faults:complete_twice", "rewards": [{"function": "own_rewards:short"}]}
    command.spec["prepare"] = {"enabled": False}

    code, output = command.start("--plain").wait()

    assert code != 0, output + command.logs()
    failure = command.status().status.failure
    assert failure is not None
    assert (failure.reason, failure.exit_code) == ("RolloutFunctionFailed", 2)
    assert failure.message is not None
    assert "faults:complete_twice returns 8 prompt_ids for 4 prompts: one for each, since" in failure.message


def test_the_tools_of_an_environment_are_called_and_its_own_reward_counts(
    command: Command, trainer_python: Path
) -> None:
    [templates] = trainer_python.parents[1].glob("lib/*/site-packages/trl/chat_templates")
    command.spec["model"]["chatTemplate"] = (templates / "qwen2_5.jinja").read_text()
    command.spec["code"]["path"] = str(Path(__file__).with_name("own_code"))
    command.spec["grpo"] |= {
        "rolloutFunction": "guessing:Guess",
        "trainerClass": "guessing:GuessingTrainer",
        "rewards": [{"function": "guessing:told"}],
    }
    command.spec["grpo"]["args"] |= {"max_completion_length": 200, "max_steps": 1}

    code, output = command.start().wait()

    assert code == 0, output + command.logs()
    [metrics] = [
        fact.body.metrics for fact in command.facts() if fact.body.type == "Logged" and "loss" in fact.body.metrics
    ]
    # Each guessed once, half of them right: the model was told so, and the environment rewards it.
    assert {name: float(metrics[f"rewards/{name}/mean"]) for name in ("told", "Guess")} == {"told": 0.5, "Guess": 0.5}
    assert float(metrics["tools/call_frequency"]) == 1
    assert float(metrics["tools/failure_frequency"]) == 0
