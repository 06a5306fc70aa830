"""The generated tests of open-r1/codeforces are read from their folder, a Parquet file a contest."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
import pyarrow, pyarrow.parquet
from posttrain_workloads.rewards.contests import CodeforcesProblem

rows = [
    {"problem_id": "7/A", "test_case_i": 0, "input": "1", "output": "2"},
    {"problem_id": "7/B", "test_case_i": 0, "input": "x", "output": "y"},
    {"problem_id": "7/A", "test_case_i": 1, "input": "3", "output": "6"},
]
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), f"{sys.argv[1]}/test_cases_0007.parquet")
row = {"id": "7/A", "contest_id": "7", "language": "cpp", "official_tests": [{"input": "0", "output": "0"}]}
row |= {"time_limit": 1.0, "memory_limit": 64.0, "input_mode": "stdio", "generated_tests": 2}
print(json.dumps([[test.input, test.output] for test in CodeforcesProblem.of_row(row).tests]))
"""


@pytest.mark.workloads
def test_the_generated_tests_follow_the_official_ones(trainer_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [trainer_python, "-c", SCRIPT, tmp_path],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "operator"), str(ROOT / "workloads")]),
            "CF_TESTS_FOLDER": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout) == [["0", "0"], ["1", "2"], ["3", "6"]]
