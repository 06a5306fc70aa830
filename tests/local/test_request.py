"""What a machine cannot do with a file is said before anything is written, all at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import dump_document
from posttrain.errors import InvalidResource, UserError
from posttrain.local.machine import Gpu, Machine
from posttrain.local.preflight import read_code, read_secrets, resolve_paths
from posttrain.local.request import Options, Request, load_requests
from tests.support.builders import build_spec

LAPTOP = Machine(name="laptop", cpus=2, memory_bytes=2**34, gpus=())
BOX = Machine(name="box", cpus=8, memory_bytes=2**36, gpus=(Gpu(device="GPU-a", name="L4", memory_mib=23034),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, data, and a place for run.yaml."""
    (tmp_path / "inputs" / "model").mkdir(parents=True)
    (tmp_path / "inputs" / "train.jsonl").touch()
    return tmp_path


def load(
    folder: Path,
    *,
    machine: Machine = LAPTOP,
    sets: tuple[str, ...] = (),
    claims: dict[str, Path] | None = None,
    secrets: dict[str, Path] | None = None,
    beside: str = "",
    **changes: Any,
) -> Request:
    """Write a run of local files, changed so, and load it."""
    files = {"model": {"source": "file://inputs/model"}, "datasets": [{"source": "file://inputs/train.jsonl"}]}
    run = {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo"},
        "spec": build_spec(**{**files, **changes}),
    }
    (folder / "run.yaml").write_text(dump_document(run) + beside)
    options = Options(file=folder / "run.yaml", sets=sets, claims=claims or {}, secrets=secrets or {}, state=None)
    (request,) = load_requests(options, machine=machine, state_root=folder / "state")
    return request


def refusal(folder: Path, **how: Any) -> list[str]:
    """Return the problems, each without the file's name and line."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InvalidResource) as refused:
        load(folder, **how)
    assert {path.name for path in sorted(folder.rglob("*"))} <= {"run.yaml", *(path.name for path in before)}
    return [str(problem) for problem in refused.value.problems]


def test_relative_paths_start_at_the_file_and_become_absolute(folder: Path) -> None:
    spec = load(folder).run.spec

    assert spec.model.source == f"file://{folder}/inputs/model"
    assert spec.datasets[0].source == f"file://{folder}/inputs/train.jsonl"


def test_a_folder_may_have_spaces_in_its_name(folder: Path) -> None:
    (folder / "my project" / "inputs" / "model").mkdir(parents=True)
    (folder / "my project" / "inputs" / "train.jsonl").touch()

    assert load(folder / "my project").run.spec.model.source == f"file://{folder}/my project/inputs/model"


def test_relative_paths_on_the_command_line_start_at_the_file_too(folder: Path) -> None:
    (folder / "other.jsonl").touch()

    spec = load(folder, sets=("spec.datasets[0].source=file://./x/../other.jsonl",)).run.spec

    assert spec.datasets[0].source == f"file://{folder}/other.jsonl"


def test_a_resource_that_is_no_resource_is_left_for_the_schema_to_refuse() -> None:
    data: dict[str, Any] = {"spec": {"model": "x", "datasets": {"source": 1}, "evalDatasets": [3], "code": []}}

    assert resolve_paths(data, folder=Path("/f")) == data
    assert resolve_paths({"spec": 3}, folder=Path("/f")) == {"spec": 3}


def test_every_missing_file_is_named_with_its_line(folder: Path) -> None:
    changes = {
        "model": {"source": "file://inputs/train.jsonl"},
        "datasets": [{"source": "file://nowhere"}],
        "evalDatasets": [{"source": "file:///nowhere/held.jsonl"}],
    }

    with pytest.raises(InvalidResource) as refused:
        load(folder, **changes)

    lines = str(refused.value).splitlines()
    assert [line.removeprefix(f"{folder}/run.yaml:").partition(": ")[2] for line in lines] == [
        f"spec.model.source: {folder}/inputs/train.jsonl is a file: name the folder with the model's config.json",
        f"spec.datasets[0].source: there is no {folder}/nowhere: correct the path (a relative one starts at the folder "
        "of the resource's file)",
        "spec.evalDatasets[0].source: there is no /nowhere/held.jsonl: correct the path (a relative one starts at the "
        "folder of the resource's file)",
    ]
    assert all(line.startswith(f"{folder}/run.yaml:") and line.split(":")[1].isdecimal() for line in lines)


def test_claims_without_a_folder_are_refused_with_the_option_to_add(folder: Path) -> None:
    changes = {
        "model": {"source": "pvc://models/smol"},
        "datasets": [{"source": "pvc://data/train.jsonl"}, {"source": "pvc://data/none.jsonl"}],
        "checkpoints": {"storage": {"claimName": "results"}},
    }

    problems = refusal(folder, claims={"data": folder / "inputs", "results": folder / "none"}, **changes)

    assert problems == [
        "spec.model.source: claim models is a volume of a cluster: say which folder stands for it, "
        "--claim models=FOLDER",
        f"spec.datasets[1].source: there is no {folder}/inputs/none.jsonl: correct the path (a relative one starts at "
        "the folder of the resource's file)",
        f"spec.checkpoints.storage.claimName: --claim results={folder}/none: there is no such folder",
    ]


def test_one_file_serves_laptop_and_cluster_with_claims_as_folders(folder: Path) -> None:
    changes = {"model": {"source": "pvc://in/model"}, "datasets": [{"source": "pvc://in/train.jsonl"}]}

    request = load(folder, claims={"in": folder / "inputs"}, **changes)

    assert request.claims == {"in": folder / "inputs"}
    assert request.run.spec.model.source == "pvc://in/model"


def test_secrets_without_a_folder_or_key_are_refused(folder: Path) -> None:
    (folder / "hf").mkdir()
    changes = {
        "access": {"hubTokenSecretRef": {"name": "hf", "key": "token"}},
        "tracking": {"secretRef": "wandb"},
        "podOverrides": {"envFromSecrets": ["more"]},
    }

    problems = refusal(folder, secrets={"hf": folder / "hf", "more": folder / "none"}, **changes)

    assert problems == [
        f"spec.access.hubTokenSecretRef: --secret hf={folder}/hf: there is no file token in that folder",
        "spec.tracking.secretRef: Secret wandb is an object of a cluster: say which folder stands for it, "
        "--secret wandb=FOLDER, with a file for each key in it",
        f"spec.podOverrides.envFromSecrets[0]: --secret more={folder}/none: there is no such folder",
    ]


def test_secrets_are_read_as_a_mounted_volume_without_the_line_break_of_an_editor(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_x\n")
    (tmp_path / ".hidden").write_text("x")

    assert read_secrets({"hf": tmp_path, "none": tmp_path / "none"}) == {"hf": {"token": "hf_x"}}


PROGRAMS = {"sft": None, "grpo": {"rewards": [{"name": "code"}]}}


def test_a_machine_without_the_walls_of_the_sandbox_is_told_what_else_can_run_programs(folder: Path) -> None:
    mac = replace(LAPTOP, system="Darwin")

    (problem,) = refusal(folder, machine=mac, **PROGRAMS)

    assert problem == (
        "spec.grpo.sandbox: the walls of posttrain's own sandbox are Linux's, and this is macOS: run it on Linux, "
        "or name a Piston of your own, --set 'spec.grpo.sandbox={mode: Piston, endpoints: [http://HOST:2000]}' "
        "(docs/sandbox.md)"
    )
    assert load(folder, machine=LAPTOP, **PROGRAMS).run.spec.own_sandbox is not None
    assert load(folder, machine=mac, **{**PROGRAMS, "prepare": {"dryRun": True}}).run.spec.own_sandbox is not None
    rented = {**PROGRAMS["grpo"], "sandbox": {"mode": "E2B", "apiKeySecretRef": {"name": "e2b", "key": "k"}}}
    (problem,) = refusal(folder, machine=mac, **{**PROGRAMS, "grpo": rented})
    assert problem.startswith(
        "spec.grpo.sandbox.apiKeySecretRef: Secret e2b is an object of a cluster: say which folder"
    )
    piston = {"mode": "Piston", "endpoints": ["http://127.0.0.1:2000"]}
    elsewhere = {"sft": None, "grpo": {**PROGRAMS["grpo"], "sandbox": piston}}
    assert load(folder, machine=mac, **elsewhere).run.spec.own_sandbox is None


def test_more_gpus_than_the_machine_has_are_refused_with_the_option_to_add(folder: Path) -> None:
    none = refusal(folder, resources={"gpusPerNode": 8})
    one = refusal(folder, machine=BOX, resources={"gpusPerNode": 2})

    assert none == [
        "spec.resources.gpusPerNode: 8 asked for, and this machine has no GPU: add "
        "--set spec.resources.gpusPerNode=0, which trains on its CPUs"
    ]
    assert one == [
        "spec.resources.gpusPerNode: 2 asked for, and this machine has 1 GPU: add --set spec.resources.gpusPerNode=1, "
        "or --set spec.resources.gpusPerNode=0, which trains on its CPUs"
    ]


def test_several_nodes_with_gpus_are_refused_and_without_are_not(folder: Path) -> None:
    (problem,) = refusal(folder, machine=BOX, resources={"gpusPerNode": 1, "numNodes": 2})

    assert problem.startswith("spec.resources.numNodes: 2 nodes with GPUs asked for, and this machine is one")
    assert load(folder, resources={"gpusPerNode": 0, "numNodes": 2}).run.spec.resources.num_nodes == 2


def test_servers_need_gpus_beside_those_of_the_gang_and_none_without(folder: Path) -> None:
    grpo = {"sft": None, "grpo": {"rewards": [{"name": "format"}], "rollout": {"mode": "Server"}}}

    assert refusal(folder, machine=BOX, resources={"gpusPerNode": 1}, **grpo) == [
        "spec.grpo.rollout.server: the gang and its rollout servers have 2 GPUs together, and this machine has 1 GPU: "
        "lower spec.resources.gpusPerNode, or spec.grpo.rollout.server.replicas or gpusPerNode, or add --set "
        "'spec.grpo.rollout={mode: Colocate}'"
    ]
    colocated = ("spec.grpo.rollout={mode: Colocate}",)
    assert load(folder, machine=BOX, sets=colocated, resources={"gpusPerNode": 1}, **grpo).run.spec.gpus == 1
    assert load(folder, machine=BOX, resources={"gpusPerNode": 0}, **grpo).run.spec.gpus == 0


def test_another_image_is_refused_because_there_are_no_containers(folder: Path) -> None:
    (problem,) = refusal(folder, podOverrides={"image": "mine:1"})

    assert "--set spec.podOverrides.image=" in problem
    assert load(folder, podOverrides={"image": "mine:1"}, sets=("spec.podOverrides.image=",)).run.spec.pod_overrides


def test_problems_of_the_spec_and_of_the_machine_come_together(folder: Path) -> None:
    parallelism = {"strategy": "ZeRO2", "config": {"zero_optimization": {"stage": 3}}}

    problems = refusal(folder, parallelism=parallelism, datasets=[{"source": "file://nowhere"}])

    assert len(problems) == 2
    assert problems[1].startswith("spec.parallelism.config")


def test_a_wrong_field_hides_no_problem_of_the_machine_or_of_other_fields(folder: Path) -> None:
    problems = refusal(
        folder,
        datasets=[{"source": "file://nowhere", "weight": 1}],
        sft={"args": {"learning_rat": 1e-4, "output_dir": "x"}},
        parallelism={"strategy": "ZeRO2", "config": {"zero_optimization": {"stage": 3}}},
        resources={"gpusPerNode": 8},
        restart={},
    )

    assert [problem.partition(": ")[0] for problem in problems] == [
        "spec.datasets[0].source",
        "spec.datasets[0].weight",
        "spec.sft.args.learning_rat",
        "spec.sft.args.output_dir",
        "spec.resources.gpusPerNode",
        "spec.parallelism.config.zero_optimization.stage",
        "spec.restart",
    ]


def test_of_a_field_that_is_wrong_nothing_more_is_said(folder: Path) -> None:
    for resources in ({"gpuPerNode": 0}, {"gpusPerNode": "0"}, {"gpusPerNode": -1}):
        (problem,) = refusal(folder, resources=resources)

        assert problem.startswith(f"spec.resources.{next(iter(resources))}: ")


def test_own_code_of_a_folder_becomes_what_a_config_map_would_hold(folder: Path) -> None:
    for path in ("code/callbacks.py", "code/rewards/math.py", "code/.git/config", "code/__pycache__/x.pyc"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"# {path}\n")

    request = load(folder, code={"path": "code"})

    assert request.config_maps == {
        str(folder / "code"): {"callbacks.py": "# code/callbacks.py\n", "rewards..math.py": "# code/rewards/math.py\n"}
    }


def test_own_code_that_is_missing_too_large_or_no_text_is_refused(folder: Path) -> None:
    (folder / "large").mkdir()
    (folder / "large" / "data.json").write_text("x" * 2**20 + "x")
    (folder / "binary").mkdir()
    (folder / "binary" / "weights.bin").write_bytes(b"\xff\xfe\x00")

    assert "there is no folder" in refusal(folder, code={"path": "nowhere"})[0]
    assert "1048577 bytes" in refusal(folder, code={"path": "large"})[0]
    with pytest.raises(UserError, match=r"weights\.bin is no text"):
        read_code(folder / "binary")


def test_a_config_map_with_own_code_may_stand_in_the_same_file(folder: Path) -> None:
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}, "data": {"a.py": "A = 1\n"}}
    code = {"configMapName": "mine"}

    assert load(folder, code=code, beside="---\n" + dump_document(document)).config_maps == {
        "mine": {"a.py": "A = 1\n"}
    }
    assert "another document" in refusal(folder, code=code)[0]


def test_the_command_that_says_the_same_again_is_quoted_for_a_shell(tmp_path: Path) -> None:
    options = Options(
        file=Path("my run.yaml"),
        sets=("spec.datasets[0].fraction='0.5'",),
        claims={"data": Path("/d")},
        secrets={"hf": Path("s")},
        state=Path("/state"),
    )

    assert options.command == (
        "posttrain run 'my run.yaml' --set 'spec.datasets[0].fraction='\"'\"'0.5'\"'\"'' --claim data=/d --secret hf=s "
        "--state /state"
    )
