"""What an environment's interpreter finds of posttrain, which is not installed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from posttrain.local.packages import link_packages

PROGRAM = """
import posttrain, posttrain_workloads
from importlib.metadata import entry_points
print(posttrain.__file__, posttrain.__version__)
print(*sorted(plugin.name for plugin in entry_points(group="vllm.general_plugins")))
"""


def test_the_folder_has_the_packages_and_their_entry_points_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    link_packages(folder)
    (folder / "posttrain-0.0.1.dist-info").symlink_to(tmp_path)  # of an installation before

    link_packages(folder)

    assert sorted(entry.name.split("-")[0] for entry in folder.iterdir()) == [
        *("posttrain", "posttrain", "posttrain_workloads"),
    ]
    # Without what this interpreter has installed.
    told = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    where, plugins = told.stdout.splitlines()
    assert where.startswith(f"{folder}/posttrain/__init__.py ")
    assert not where.endswith("+source")
    assert plugins == "posttrain_gloo posttrain_last_words posttrain_plain_weights posttrain_seeds"
