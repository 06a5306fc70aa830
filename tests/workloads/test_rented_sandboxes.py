"""Programs on machines of E2B and Morph: the real SDKs against servers on loopback that speak as the services do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_services import KEY, FakeService, fake_service
from tests.workloads._command import Command
from tests.workloads._configs import GRPO_ARGS
from tests.workloads._prepare_configs import run_script, write_jsonl

pytestmark = pytest.mark.workloads

DOUBLE = {"code": "print(int(input()) * 2)", "stdin": "21", "run_seconds": 10.0}
COUNT = {"code": "import sys; text = sys.stdin.read(); print(len(text)); print(text[-3:])", "run_seconds": 10.0}
LOOP = {"code": "print('begun', flush=True)\nwhile True: pass", "run_seconds": 1.0}
MODES = ["E2B", "Morph"]


def run(fake: FakeService, mode: str, *programs: dict[str, Any], python: Path, folder: Path, **changes: Any) -> Any:
    asked = {"mode": mode, "template": "tried", "api_key": KEY, "parallel": 2, "programs": programs, **changes}
    answers = run_script("rent_cases.py", asked, python=python, folder=folder, environ=fake.environ)
    return answers["results"]


@pytest.mark.parametrize("mode", MODES)
def test_each_program_has_its_own_end_and_all_of_its_output(mode: str, trainer_python: Path, tmp_path: Path) -> None:
    with fake_service() as fake:
        long = {**COUNT, "stdin": "x" * 200_000 + "end"}
        programs = [DOUBLE, long, LOOP, {**DOUBLE, "stdin": "no number"}]
        double, counted, loop, failed = run(fake, mode, *programs, python=trainer_python, folder=tmp_path)

    assert double == {"stdout": "42\n", "stderr": "", "code": 0, "compiled": True}
    assert counted["stdout"] == "200003\nend\n"
    assert (loop["stdout"], loop["code"]) == ("begun\n", None)
    assert failed["code"] == 1
    assert "ValueError: invalid literal" in failed["stderr"]
    assert 1 <= len(fake.lent) <= 2  # no more than run at the same time
    assert sorted(fake.ended) == [f"machine{number + 1}" for number in range(len(fake.lent))]
    asked = {
        "E2B": {"templateID": "tried", "timeout": 3600, "allow_internet_access": False, "metadata": {}, "envVars": {}},
        "Morph": {"snapshot_id": "tried", "ttl_seconds": 3600, "ttl_action": "stop", "metadata": None},
    }
    assert fake.lent[0] == asked[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_machine_that_fails_is_replaced_and_one_that_is_not_to_be_had_is_no_answer(
    mode: str, trainer_python: Path, tmp_path: Path
) -> None:
    with fake_service() as fake:
        fake.failures = 2
        [double] = run(fake, mode, DOUBLE, python=trainer_python, folder=tmp_path)
        assert double["stdout"] == "42\n"
        assert len(fake.lent) == 3

        [refused] = run(fake, mode, DOUBLE, python=trainer_python, folder=tmp_path, api_key="e2b_wrong")
        assert refused["error"].startswith(f"no machine of {mode} ran it in 3 attempts; the last time ")
        assert "no such key" in refused["error"]
        assert len(fake.lent) == 3


def test_a_run_rewards_programs_on_machines_to_which_it_has_the_key_from_a_secret(
    tmp_path: Path, tiny_model: Path
) -> None:
    tests = [{"input": str(number), "output": str(2 * number)} for number in (2, 21)]
    row = {"problem": "Double it.", "verification_info": {"language": "python", "test_cases": tests}}
    rows = write_jsonl(tmp_path / "problems.jsonl", 8 * [row])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "api-key").write_text(f"{KEY}\n")
    with fake_service() as fake:
        command = Command(
            folder=tmp_path / "work",
            spec={
                "model": {"source": f"file://{tiny_model}"},
                "datasets": [{"source": f"file://{rows}"}],
                "promptColumn": "problem",
                "code": {"path": str(Path(__file__).with_name("own_code"))},
                "grpo": {
                    "args": {**GRPO_ARGS, "max_steps": 1},
                    "rewards": [{"name": "code"}],
                    "sandbox": {"mode": "E2B", "apiKeySecretRef": {"name": "e2b", "key": "api-key"}, "concurrency": 2},
                    "trainerClass": "written_programs:ProgramTrainer",
                },
                "resources": {"gpusPerNode": 0},
                "prepare": {"enabled": False},
                "podOverrides": {"env": [{"name": name, "value": url} for name, url in fake.environ.items()]},
            },
        )
        try:
            code, output = command.start("--secret", f"e2b={tmp_path / 'secret'}").wait()
            assert code == 0, output + command.logs()
            [metrics] = [
                fact.body.metrics
                for fact in command.facts()
                if fact.body.type == "Logged" and "loss" in fact.body.metrics
            ]
        finally:
            command.end()

    assert (float(metrics["rewards/code/mean"]), float(metrics["rewards/code/unscored"])) == (0.5, 0)
    assert 1 <= len(fake.lent) <= 2
    assert len(fake.ended) == len(fake.lent)
