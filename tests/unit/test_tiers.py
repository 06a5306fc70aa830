"""A tier that was promised and did not run is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ANY_TEST = "tests/unit/test_layout.py::test_operator_is_a_folder_and_never_a_package"


def run_pytest(test: str, *, require: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env={**os.environ, "POSTTRAIN_REQUIRE": require},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_session_without_the_promised_tier_fails() -> None:
    promised = run_pytest(ANY_TEST, require="kueue")
    assert promised.returncode == 1
    assert "NOT RUN: kueue: $POSTTRAIN_REQUIRE promises it, and no test marked kueue ran" in promised.stdout
    assert promised.stdout.splitlines()[-1].strip("= ").startswith("1 passed")

    assert run_pytest(ANY_TEST, require="").returncode == 0


def test_a_promise_of_an_unknown_part_is_refused() -> None:
    refused = run_pytest(ANY_TEST, require="control-plan")

    assert refused.returncode == 4
    assert "['control-plan']; there are ['control-plane', 'kueue', 'node']" in refused.stderr
