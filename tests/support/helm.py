"""The real helm, as the tests of the chart call it.

It owns where the program is found and how its output is read; it must not know what the chart should contain.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.components import HELM, program

CHART = Path(__file__).parents[2] / "charts" / "posttrain"
Manifest = dict[str, Any]


class HelmRefused(Exception):
    """helm did not take the chart or its values; the message is helm's."""


def find_helm() -> Path:
    """Return the program: the one that is built beside the test cluster's, else what PATH has; without one, skip."""
    built, on_path = program(HELM, "helm") if shutil.which("go") else None, shutil.which("helm")
    if built is not None and built.is_file():
        return built
    if on_path is None:
        pytest.skip("NOT RUN: helm is neither built (make cluster-binaries PARTS=node) nor on PATH")
    return Path(on_path)


def helm(*arguments: str | Path) -> str:
    """Return what helm writes.

    Raises:
        HelmRefused: it failed.
    """
    with tempfile.TemporaryDirectory() as home:  # nothing of this machine's own repositories and plugins
        environ = {"PATH": os.environ["PATH"], "HOME": home}
        done = subprocess.run(
            [find_helm(), *arguments], env=environ, capture_output=True, text=True, check=False, timeout=60
        )
    if done.returncode:
        raise HelmRefused(done.stderr + done.stdout)
    return done.stdout


def render(
    values: Mapping[str, Any] | None = None, *, release: str = "posttrain", namespace: str = "posttrain-system"
) -> list[Manifest]:
    """Return the objects that the chart becomes.

    Raises:
        HelmRefused: the values do not fit the schema, or a template fails.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values or {}, file)
        file.flush()
        text = helm("template", release, CHART, "--namespace", namespace, "--values", Path(file.name))
    return [document for document in yaml.safe_load_all(text) if document is not None]


def pick(objects: list[Manifest], kind: str, name: str = "posttrain-operator") -> Manifest:
    """Return the one object of that kind and name."""
    (found,) = [item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found
