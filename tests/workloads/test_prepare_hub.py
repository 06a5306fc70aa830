"""Prepare against a Hub: commits, downloads, and its refusals told apart. The Hub is one on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import TOKEN, FakeHub, Repo, serve
from tests.workloads._configs import free_port
from tests.workloads._prepare_configs import CONVERSATIONS, build_case_config, run_cases, write_jsonl
from tests.workloads.test_prepare import copy_model

pytestmark = pytest.mark.workloads


@dataclass(frozen=True)
class Answered:
    """What was found, what was asked of the Hub, and where its files were cached."""

    found: dict[str, Any]
    requests: list[str]
    cache: Path


@pytest.fixture(scope="module")
def repos(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "train.jsonl", CONVERSATIONS)
    write_jsonl(folder / "data" / "test.jsonl", CONVERSATIONS[:4])
    model = copy_model(tiny_model, folder / "model")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"0")
    pickled = copy_model(tiny_model, folder / "pickled", without=("*.safetensors",))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return {
        "model": Repo("models", "org/tiny", model, branches=("main", "v1")),
        "pickled": Repo("models", "org/pickled", pickled),
        "gated model": Repo("models", "org/gated", tiny_model, gated=True),
        "data": Repo("datasets", "org/sums", folder / "data"),
        "gated data": Repo("datasets", "org/gated-sums", folder / "data", gated=True),
    }


@pytest.fixture(scope="module")
def hub(repos: dict[str, Repo]) -> Iterator[FakeHub]:
    with serve(*repos.values()) as server:
        yield server


@pytest.fixture(scope="module")
def answered(hub: FakeHub, trainer_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    folder = tmp_path_factory.mktemp("prepare-hub")

    def case(name: str, *, model: str = "org/tiny", data: Any = None, **more: Any) -> dict[str, Any]:
        settings = {key: more.pop(key) for key in ("environ", "endpoint", "what") if key in more}
        member = {"source": "org/sums", **(data or {})}
        return {"name": name, "config": build_case_config(model=model, datasets=[member], **more), **settings}

    cases = [
        case("unreachable", endpoint=f"http://127.0.0.1:{free_port()}"),
        case("only revisions", prepare={"enabled": False}),
        case("good", model_fields={"revision": "v1"}, evalDatasets=[{"source": "hf://org/sums", "split": "test"}]),
        case("gated", model="org/gated", data={"source": "org/gated-sums"}),
        case("good token", environ={"HF_TOKEN": TOKEN}, model="org/gated", data={"source": "org/gated-sums"}),
        case("bad token", environ={"HF_TOKEN": "hf_old"}),
        case("missing", model="org/nothing", data={"source": "org/nothing-either"}),
        case("no such revision", model_fields={"revision": "v9"}),
        case("no such split", data={"split": "validation"}),
        case("no such config", data={"config": "all"}),
        case("pickled", model="org/pickled"),
        case("maintenance", model="down/for-now"),
        case("on gpus", resources={"gpusPerNode": 1}, gpu_memory=80 * 2**30),
    ]
    found = run_cases(
        cases,
        python=trainer_python,
        folder=folder,
        environ={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"},
    )
    requests = list(hub.requests)
    hub.requests.clear()
    loaded = {"name": "load", "what": "model", "config": _resolved(cases[2]["config"], found["good"]["commits"])}
    mixed = {"name": "mix", "what": "data", "config": loaded["config"]}
    again = run_cases(
        [loaded, mixed],
        python=trainer_python,
        folder=folder / "again",
        environ={"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf-home")},
    )
    return Answered(found={**found, **again}, requests=requests, cache=folder / "hf-home" / "hub")


def _resolved(config: Any, commits: dict[str, str]) -> Any:
    """Return the config as the plan writes it for the ranks: with commits."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"revision": commits["model"]}),
            "datasets": (config.datasets[0].model_copy(update={"revision": commits["datasets/0"]}),),
            "eval_datasets": (config.eval_datasets[0].model_copy(update={"revision": commits["evalDatasets/0"]}),),
        }
    )


def the_problem(answered: Answered, name: str) -> str:
    [problem] = answered.found[name]["problems"]
    return str(problem)


def test_every_source_is_resolved_to_its_commit(answered: Answered, repos: dict[str, Repo]) -> None:
    good = answered.found["good"]
    assert good["problems"] == []
    data = repos["data"].commit
    assert good["commits"] == {"model": repos["model"].commit, "datasets/0": data, "evalDatasets/0": data}
    assert good["result"]["artifacts"] == {
        "model": f"hf://org/tiny@{repos['model'].commit}",
        "datasets/0": f"hf://org/sums@{data}",
        "evalDatasets/0": f"hf://org/sums@{data}",
    }
    assert good["estimates"]["rows"] == "20"


def test_revisions_are_resolved_even_where_prepare_is_off(answered: Answered, repos: dict[str, Repo]) -> None:
    only = answered.found["only revisions"]
    assert only["problems"] == []
    assert only["commits"] == {"model": repos["model"].commit, "datasets/0": repos["data"].commit}
    assert only["estimates"] == {}


def test_the_weights_are_fetched_and_other_formats_are_not(answered: Answered, repos: dict[str, Repo]) -> None:
    snapshot = answered.cache / "models--org--tiny" / "snapshots" / repos["model"].commit
    present = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}
    assert "model.safetensors" in present and "tokenizer.json" in present
    assert "pytorch_model.bin" not in present and "onnx/model.onnx" not in present


def test_nothing_is_fetched_of_a_model_that_is_refused(answered: Answered) -> None:
    problem = the_problem(answered, "pickled")
    assert problem.startswith("UnsafeWeights: ") and "pytorch_model.bin" in problem
    assert not any("org/pickled/resolve" in request and ".bin" in request for request in answered.requests)


def test_ranks_load_what_prepare_fetched(answered: Answered) -> None:
    assert answered.found["load"]["problems"] == []
    mixed = answered.found["mix"]
    assert mixed["problems"] == []
    assert (len(mixed["train"]), len(mixed["test"])) == (20, 4)


def test_the_memory_estimate_needs_no_weights(answered: Answered) -> None:
    on_gpus = answered.found["on gpus"]
    assert on_gpus["problems"] == []
    assert on_gpus["estimates"]["memory per GPU"].endswith(" of 80.0 GiB")


def test_a_token_opens_what_is_gated(answered: Answered) -> None:
    assert answered.found["good token"]["problems"] == []
    for problem, kind in zip(answered.found["gated"]["problems"], ("model", "dataset"), strict=True):
        assert problem.startswith("GatedModel: ") and f"{kind} org/gated" in problem
        assert "ask for access" in problem


def test_a_token_that_the_hub_refuses_is_told_of(answered: Answered) -> None:
    problems = answered.found["bad token"]["problems"]
    assert all(problem.startswith("HubAuthenticationFailed: ") for problem in problems)
    assert "spec.access.hubTokenSecretRef" in problems[0]


def test_every_missing_source_is_named(answered: Answered) -> None:
    model, data = answered.found["missing"]["problems"]
    assert model.startswith("ModelNotFound: spec.model: model org/nothing ")
    assert data.startswith("DatasetNotFound: spec.datasets[0]: dataset org/nothing-either ")


def test_a_revision_a_split_and_a_config_that_are_not_there_are_told_apart(answered: Answered) -> None:
    assert "no such revision" in the_problem(answered, "no such revision")
    split = the_problem(answered, "no such split")
    assert split.startswith("DatasetNotFound: spec.datasets[0]: ") and "validation" in split and "test" in split
    assert "all" in the_problem(answered, "no such config")


def test_a_hub_that_does_not_answer_is_not_a_missing_model(answered: Answered) -> None:
    for name in ("unreachable", "maintenance"):
        problems = answered.found[name]["problems"]
        assert problems and all(problem.startswith("HubUnreachable: ") for problem in problems), name
