"""The images: their locks are uv.lock's, and the operator's lock is enough for the operator."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from uv import find_uv_bin

from posttrain.local.environments import cache_root, ensure_environment

ROOT = Path(__file__).parents[2]
IMAGES = ("operator", "sandbox", "trainer")


def lines_of(text: str) -> list[str]:
    """Return the lines of a lock without uv's comments, which name the command's own options."""
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_these_are_all_images() -> None:
    assert sorted(file.parent.name for file in ROOT.glob("images/*/Dockerfile")) == sorted(IMAGES)


@pytest.mark.parametrize("image", IMAGES)
def test_an_images_lock_is_what_uv_exports(image: str) -> None:
    exported = subprocess.run(
        [
            *(find_uv_bin(), "export", "--locked", "--offline", "--extra", image, "--no-dev", "--no-emit-project"),
            *("--format", "requirements.txt"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    committed = (ROOT / "images" / image / "requirements.txt").read_text()
    assert lines_of(committed) == lines_of(exported.stdout), "run `make generate`"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_takes_its_base_as_an_argument_and_runs_as_a_numbered_user(image: str) -> None:
    dockerfile = (ROOT / "images" / image / "Dockerfile").read_text()

    assert re.search(r"^ARG BASE=python:3\.11-slim$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE}"}
    assert re.findall(r"^USER (.+)", dockerfile, re.MULTILINE)[-1] == "10001:10001"


def test_the_operator_starts_with_what_its_lock_names() -> None:
    interpreter = ensure_environment("operator", cache=cache_root(os.environ), report=print)

    done = subprocess.run(
        [interpreter, "-m", "posttrain.control", "--help"],
        env={"PYTHONPATH": str(ROOT / "operator")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "--settings FILE" in done.stdout


def test_the_sandbox_starts_with_what_its_lock_names() -> None:
    interpreter = ensure_environment("sandbox", cache=cache_root(os.environ), report=print)

    done = subprocess.run(
        [interpreter, "-m", "posttrain_workloads.sandbox", "--help"],
        env={"PYTHONPATH": str(ROOT / "workloads")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "--concurrency" in done.stdout
