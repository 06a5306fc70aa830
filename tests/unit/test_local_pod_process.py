"""What a pod's process gets from this machine, where no golden pod spec shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.local.container import Command
from posttrain.local.pod_process import build_process
from tests.support.local_cluster import build_site

FOLDER = Path("/runs/demo")


def build(container: dict[str, Any], *, roots: dict[str, Path] | None = None, **site: Any) -> Command:
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [{"command": ["python", "-m", "x"], **container}]}}
    return build_process(pod, roots=roots or {}, cwd=FOLDER, site=build_site(FOLDER, **site))


def value(text: str, *, roots: dict[str, Path]) -> str:
    return build({"env": [{"name": "V", "value": text}]}, roots=roots).env["V"]


def test_python_is_the_environments_interpreter_and_its_scripts_come_first() -> None:
    command = build({}, interpreter=Path("/envs/trainer/bin/python"))

    assert command.argv == ("/envs/trainer/bin/python", "-m", "x")
    assert command.env["PATH"] == "/envs/trainer/bin:/usr/bin:/bin"


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


@pytest.mark.parametrize(("limits", "visible"), [({}, ""), ({"nvidia.com/gpu": "2"}, "GPU-a,GPU-b")])
def test_a_pod_sees_the_gpus_that_it_asks_for_and_no_others(limits: dict[str, str], visible: str) -> None:
    env = build({"resources": {"limits": limits}}, gpus=("GPU-a", "GPU-b", "GPU-c")).env

    assert env["CUDA_VISIBLE_DEVICES"] == visible


def test_behind_a_proxy_the_progress_server_is_reached_without_it() -> None:
    env = build({}, machine={"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intranet"}).env

    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert env["NO_PROXY"] == "intranet,127.0.0.1,localhost"
    assert env["no_proxy"] == "127.0.0.1,localhost"
