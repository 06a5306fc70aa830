"""A file with several runs: in which order, which of them an option means, and what they may refer to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import dump_document
from posttrain.errors import InvalidResource, UserError
from posttrain.local.machine import Machine
from posttrain.local.request import Options, Request, load_requests
from posttrain.local.state import RunFolder
from tests.support.builders import build_other_run, build_spec

LAPTOP = Machine(name="laptop", cpus=2, memory_bytes=2**34, gpus=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and data."""
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").touch()
    return tmp_path


def document(name: str, *, after: str | None = None, **changes: Any) -> str:
    """Return a run of local files that starts from a model, or from another run's."""
    model = {"source": "file://model"} if after is None else {"runRef": {"name": after}}
    spec = build_spec(model=model, datasets=[{"source": "file://train.jsonl"}], **changes)
    run = {"apiVersion": "posttrain.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": name}, "spec": spec}
    return dump_document(run)


def load(folder: Path, *documents: str, sets: tuple[str, ...] = ()) -> tuple[Request, ...]:
    file = folder / "runs.yaml"
    file.write_text("---\n".join(documents))
    options = Options(file=file, sets=sets, claims={}, secrets={}, state=None)
    return load_requests(options, machine=LAPTOP, state_root=folder / "state")


def names(requests: tuple[Request, ...]) -> list[str]:
    return [request.run.metadata.name for request in requests]


def store(folder: Path, **run: Any) -> None:
    """Let there be a run in the state folder."""
    stored = RunFolder(folder / "state" / "sft")
    stored.path.mkdir(parents=True)
    manifest = build_other_run("sft", **run)
    stored.resource_file.write_text(json.dumps(manifest))


def refusal(folder: Path, *documents: str) -> str:
    with pytest.raises(InvalidResource) as refused:
        load(folder, *documents)
    return str(refused.value)


def test_a_run_comes_after_the_one_that_it_starts_from(folder: Path) -> None:
    found = load(folder, document("last", after="middle"), document("middle", after="first"), document("first"))
    assert names(found) == ["first", "middle", "last"]


def test_runs_that_have_nothing_to_do_with_each_other_keep_their_order(folder: Path) -> None:
    assert names(load(folder, document("b"), document("a"))) == ["b", "a"]


def test_runs_that_start_from_each_other_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a from b and b from a.*must begin with a model\.source"):
        load(folder, document("a", after="b"), document("b", after="a"))


def test_two_runs_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="two runs have the name 'a': give each"):
        load(folder, document("a"), document("a"))


def test_an_option_names_the_run_that_it_means(folder: Path) -> None:
    found = load(folder, document("a"), document("b"), sets=("b:spec.sft.args.max_steps=3",))
    assert [request.run.spec.sft.args["max_steps"] for request in found] == [20, 3]


def test_an_option_that_names_no_run_is_refused_with_what_to_write(folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds the runs a, b: .* --set a:spec\.suspend=true"):
        load(folder, document("a"), document("b"), sets=("spec.suspend=true",))


def test_the_problems_of_all_runs_come_together(folder: Path) -> None:
    said = refusal(folder, document("a", testFraction="2"), document("b", datasetSeed=-1))
    assert "spec.testFraction" in said
    assert "spec.datasetSeed" in said


def test_a_run_may_start_from_one_that_ended_here_before(folder: Path) -> None:
    store(folder, stage="Succeeded")
    assert names(load(folder, document("grpo", after="sft"))) == ["grpo"]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("Training", "run sft has not ended (Training): run it to its end first"),
        ("Failed", "run sft has ended without a model (InProgress: it is Failed): run it anew under that name"),
    ],
)
def test_a_run_that_has_no_model_yet_is_refused(folder: Path, stage: str, says: str) -> None:
    store(folder, stage=stage)
    assert says in refusal(folder, document("grpo", after="sft"))


def test_a_run_that_is_nowhere_is_refused_with_those_that_are_there(folder: Path) -> None:
    store(folder, stage="Succeeded")
    said = refusal(folder, document("grpo", after="stf"))
    assert "there is no run stf in this file, nor in" in said
    assert "(there are: sft): write it into the same file, or run it first" in said
