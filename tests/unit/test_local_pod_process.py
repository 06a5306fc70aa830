"""What a pod's process gets from this machine, where no golden pod spec shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.local.container import Command
from posttrain.local.network import Network
from posttrain.local.pod_process import Surroundings, build_process, choose_gpus
from posttrain.plan.types import Manifest
from tests.support.local_cluster import build_site

FOLDER = Path("/runs/demo")


def build(
    container: dict[str, Any], *, roots: dict[str, Path] | None = None, gpus: tuple[str, ...] = (), **site: Any
) -> Command:
    here = build_site(FOLDER, **site)
    given = Surroundings(cwd=FOLDER, roots=roots or {}, network=Network(lambda: ()), secrets=here.secrets, gpus=gpus)
    return build_process(build_pod(container), site=here, given=given)


def build_pod(container: dict[str, Any]) -> Manifest:
    return {"metadata": {"name": "p"}, "spec": {"containers": [{"command": ["python", "-m", "x"], **container}]}}


def value(text: str, *, roots: dict[str, Path]) -> str:
    return build({"env": [{"name": "V", "value": text}]}, roots=roots).env["V"]


def test_python_is_the_environments_interpreter_and_its_scripts_come_first() -> None:
    interpreters = {f"registry/{name}": Path(f"/envs/{name}/bin/python") for name in ("trainer", "sandbox")}

    command = build({"image": "registry/sandbox:2"}, interpreters=interpreters)

    assert command.argv == ("/envs/sandbox/bin/python", "-m", "x")
    assert command.env["PATH"] == "/envs/sandbox/bin:/usr/bin:/bin"


def test_only_named_variables_of_the_machine_are_passed_on() -> None:
    assert "SECRET" not in build({}).env


def test_a_mount_below_another_mount_is_the_one_that_counts() -> None:
    roots = {"/mnt": Path("/a"), "/mnt/storage": Path("/b")}

    assert value("/mnt/storage/model", roots=roots) == "/b/model"
    assert value("/mnt/other", roots=roots) == "/a/other"


def test_a_name_that_only_begins_like_a_mount_is_no_path_in_it() -> None:
    assert value("/mnt/storage2", roots={"/mnt/storage": Path("/b")}) == "/mnt/storage2"


def test_the_machines_root_as_a_mount_leaves_an_absolute_path() -> None:
    roots = {"/mnt/files": Path("/")}

    assert (value("/mnt/files", roots=roots), value("/mnt/files/data/x", roots=roots)) == ("/", "/data/x")


def test_own_code_comes_before_posttrain_on_the_import_path() -> None:
    container = {"env": [{"name": "PYTHONPATH", "value": "/code"}]}

    assert build(container, roots={"/code": Path("/c")}).env["PYTHONPATH"] == "/c:/runs/demo/packages"


def test_secrets_become_variables_and_a_variable_of_its_own_wins() -> None:
    container = {
        "envFrom": [{"secretRef": {"name": "keys"}}],
        "env": [
            {"name": "B", "value": "mine"},
            {"name": "T", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        ],
    }

    env = build(container, secrets={"keys": {"A": "1", "B": "2"}, "hf": {"token": "x"}}).env

    assert (env["A"], env["B"], env["T"]) == ("1", "mine", "x")


@pytest.mark.parametrize(("limits", "chosen"), [({}, ()), ({"nvidia.com/gpu": "2"}, ("GPU-b", "GPU-c"))])
def test_a_pod_gets_as_many_gpus_as_it_asks_for_and_none_that_others_have(
    limits: dict[str, str], chosen: tuple[str, ...]
) -> None:
    site = build_site(FOLDER, gpus=("GPU-a", "GPU-b", "GPU-c"))

    assert choose_gpus(build_pod({"resources": {"limits": limits}}), site=site, taken={"GPU-a"}) == chosen


def test_behind_a_proxy_the_progress_server_is_reached_without_it() -> None:
    env = build({}, machine={"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intranet"}).env

    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert env["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert env["no_proxy"] == "127.0.0.1,localhost"
