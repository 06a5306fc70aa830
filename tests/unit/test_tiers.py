"""A tier that was promised and did not run is a failure; tests that share a cluster or a file share a process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ANY_TEST = "tests/unit/test_layout.py::test_operator_is_a_folder_and_never_a_package"


def run_pytest(*args: str, require: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        cwd=ROOT,
        env={**os.environ, "POSTTRAIN_REQUIRE": require},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_session_without_the_promised_tier_fails(workers: int) -> None:
    promised = run_pytest("-n", str(workers), ANY_TEST, require="kueue")
    assert promised.returncode == 1
    assert "NOT RUN: kueue: $POSTTRAIN_REQUIRE promises it, and no test marked kueue ran" in promised.stdout
    assert promised.stdout.splitlines()[-1].strip("= ").startswith("1 passed")

    assert run_pytest(ANY_TEST, require="").returncode == 0


def test_a_promise_of_an_unknown_part_is_refused() -> None:
    refused = run_pytest(ANY_TEST, require="control-plan")

    assert refused.returncode == 4
    assert "['control-plan']; there are ['control-plane', 'kueue', 'node']" in refused.stderr


def test_tests_of_one_file_and_all_on_clusters_run_in_one_process(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for file in ("integration/test_a.py", "e2e/test_b.py", "unit/test_c.py", "unit/test_d.py", "unit/test_e.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n): pass\n")

    ran = run_pytest("-v", "-n2", f"--rootdir={tmp_path}", str(tmp_path), require="")

    assert ran.returncode == 0, ran.stdout
    workers: dict[str, Counter[str]] = {}
    for worker, file in re.findall(r"^\[(gw\d)\] .* PASSED \S*(\w/test_\w\.py)", ran.stdout, re.MULTILINE):
        scope = "clusters" if file in ("n/test_a.py", "e/test_b.py") else file
        workers.setdefault(scope, Counter())[worker] += 1
    assert {scope: sorted(tests.values()) for scope, tests in workers.items()} == {
        "clusters": [8],
        "t/test_c.py": [4],
        "t/test_d.py": [4],
        "t/test_e.py": [4],
    }
