"""The command line as a person meets it: what it prints, where, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.api.loader import load_documents
from posttrain.local.state import RunFolder, locked
from tests.support.recorded_run import build_recorded_run, write_recorded_storage

RESOURCE = """\
apiVersion: posttrain.dev/v1alpha1
kind: TrainingRun
metadata:
  name: first
spec:
  model:
    source: Qwen/Qwen2.5-0.5B
  datasets:
    - source: open-r1/OpenR1-Math-220k
  sft:
    args:
      learning_rate: 2e-5
"""


def _posttrain(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from posttrain.cli import main; main()", *arguments],
        cwd=cwd,
        env={**os.environ, "POSTTRAIN_STATE": str(cwd / "state"), "NO_COLOR": "1", **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _write(folder: Path, text: str = RESOURCE, *, name: str = "run.yaml") -> str:
    (folder / name).write_text(text)
    return name


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two finished runs in the state folder."""
    for name, learning_rate in (("stratos-demo", 4e-5), ("stratos-hot", 1e-4)):
        folder = RunFolder(tmp_path / "state" / name)
        write_recorded_storage(folder.storage, learning_rate=learning_rate)
        run = build_recorded_run(name, learning_rate=learning_rate)
        folder.resource_file.write_text(json.dumps(run.to_data()))
        folder.logs.mkdir()
        folder.log_file(f"{name}-prepare-0").write_text("checked\n")
        folder.log_file(f"{name}-a1-master-0").write_text("[rank 0] one\n[rank 1] two\n")
        folder.log_file(f"{name}-a2-master-0").write_text("torchrun\n[rank 0] three\n[rank 1] four\n[rank 0] five")
    return tmp_path


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_pydantic_nor_anything_of_a_command(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom posttrain.cli import main\nsys.argv = ['posttrain', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "print(sorted(name for name in sys.modules if name.startswith('posttrain')))\n"
        "print(sorted({'torch', 'pydantic', 'yaml', 'jinja2', 'rich.live'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.splitlines()[-3:] == ["0", "['posttrain', 'posttrain.cli', 'posttrain.errors']", "[]"]


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = _posttrain("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ["run", "validate", "plan", "explain", "status", "logs", "compare", "convert", "env", "version"]:
        assert f" {command} " in shown.stdout


# --- validate ---------------------------------------------------------------------------------------------------------


def test_validate_takes_relative_paths_as_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    name = _write(tmp_path / "runs", RESOURCE.replace("Qwen/Qwen2.5-0.5B", "file://./model"))
    done = _posttrain("validate", f"runs/{name}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_valid_file_is_said_to_be_valid(tmp_path: Path) -> None:
    done = _posttrain("validate", _write(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run.yaml: TrainingRun first is valid\n", "")


def test_every_problem_of_every_file_comes_with_its_line_and_exit_code_2(tmp_path: Path) -> None:
    bad = RESOURCE.replace("learning_rate: 2e-5", "learning_rat: 2e-5\n      output_dir: x\n      packing: 3")
    _write(tmp_path, bad, name="bad.yaml")
    _write(tmp_path, "a: 1\na: 2\n", name="twice.yaml")
    done = _posttrain("validate", "bad.yaml", "twice.yaml", "missing.yaml", _write(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    starts = [line.split(" ", 1)[0] for line in done.stderr.splitlines()]
    assert starts == ["bad.yaml:12:", "bad.yaml:13:", "bad.yaml:14:", "twice.yaml:2:", "missing.yaml:"]
    assert "learning_rate?" in done.stderr
    assert done.stdout == "run.yaml: TrainingRun first is valid\n"
    assert "Traceback" not in done.stderr


def test_what_only_the_plan_knows_is_found_too(tmp_path: Path) -> None:
    bad = RESOURCE + "  parallelism:\n    strategy: ZeRO2\n    config:\n      train_batch_size: 3\n"
    done = _posttrain("validate", _write(tmp_path, bad), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("run.yaml:16: spec.parallelism.config.train_batch_size")


def test_a_typo_hides_nothing_that_only_the_plan_knows(tmp_path: Path) -> None:
    bad = RESOURCE.replace("learning_rate", "learning_rat")
    bad += "  parallelism:\n    strategy: ZeRO2\n    config:\n      train_batch_size: 3\n"
    done = _posttrain("validate", _write(tmp_path, bad), cwd=tmp_path)
    assert [line.split(" ", 1)[0] for line in done.stderr.splitlines()] == ["run.yaml:12:", "run.yaml:16:"]


def test_a_config_map_may_stand_beside_the_run(tmp_path: Path) -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: code}\ndata: {}\n---\n" + RESOURCE
    done = _posttrain("validate", _write(tmp_path, text), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run.yaml: TrainingRun first is valid\n")


# --- run and plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_file_ends_with_2_and_writes_nothing(command: str, tmp_path: Path) -> None:
    _write(tmp_path, RESOURCE.replace("  sft:", "  sftt:"))
    done = _posttrain(command, "run.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "sft" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


def test_an_option_without_a_folder_is_refused(tmp_path: Path) -> None:
    done = _posttrain("run", _write(tmp_path), "--claim", "data", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "--claim data: write it as --claim NAME=FOLDER\n")


def test_the_plan_is_every_object_of_the_first_attempt_in_apply_order(tmp_path: Path) -> None:
    done = _posttrain("plan", _write(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    objects = list(yaml.safe_load_all(done.stdout))
    assert [(o["kind"], o["metadata"]["name"]) for o in objects] == [
        ("ServiceAccount", "first"),
        ("PersistentVolumeClaim", "first"),
        ("NetworkPolicy", "first"),
        ("ConfigMap", "first-prepare"),
        ("Job", "first-prepare"),
        ("ConfigMap", "first-a1"),
        ("PyTorchJob", "first-a1"),
    ]
    config = json.loads(objects[5]["data"]["config.json"])
    assert config["model"] == {"kind": "Hub", "repo": "Qwen/Qwen2.5-0.5B", "revision": "main"}


def test_set_changes_the_plan(tmp_path: Path) -> None:
    changes = ("--set", "spec.sft.args.learning_rate=1e-4", "--set", "metadata.name=second")
    done = _posttrain("plan", _write(tmp_path), *changes, cwd=tmp_path)
    config = json.loads(list(yaml.safe_load_all(done.stdout))[5]["data"]["config.json"])
    assert (config["run"]["name"], config["args"]["learning_rate"]) == ("second", 1e-4)


# --- explain and convert ----------------------------------------------------------------------------------------------


def test_a_field_is_explained(tmp_path: Path) -> None:
    done = _posttrain("explain", "spec.sft.args.packing", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("spec.sft.args.packing")


def test_an_unknown_field_is_named_with_the_nearest(tmp_path: Path) -> None:
    done = _posttrain("explain", "spec.modle", cwd=tmp_path)
    assert done.returncode == 2
    assert "spec.model" in done.stderr


RECIPE = """\
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: HuggingFaceH4/Bespoke-Stratos-17k
learning_rate: 1.0e-05
packing: true
push_to_hub: true
"""


def test_a_recipe_becomes_a_valid_file_and_what_is_dropped_is_named(tmp_path: Path) -> None:
    _write(tmp_path, RECIPE, name="config_demo.yaml")
    done = _posttrain(
        "convert", "config_demo.yaml", "--accelerate", "zero3", "--gpus", "4", "-o", "demo.yaml", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "push_to_hub" in done.stderr
    written = yaml.safe_load((tmp_path / "demo.yaml").read_text())
    assert written["metadata"]["name"] == "demo"
    assert written["spec"]["parallelism"] == {"strategy": "ZeRO3"}
    assert written["spec"]["resources"] == {"numNodes": 1, "gpusPerNode": 4}
    assert _posttrain("validate", "demo.yaml", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "config_demo.yaml", "-o", "config_demo.yaml/demo.yaml"),
        ("compare", "stratos-demo", "stratos-hot", "-o", "config_demo.yaml/both.html"),
    ],
)
def test_an_output_that_cannot_be_written_is_a_message(arguments: tuple[str, ...], recorded: Path) -> None:
    _write(recorded, RECIPE, name="config_demo.yaml")
    done = _posttrain(*arguments, cwd=recorded)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{arguments[-1]} cannot be written (")
    assert last.endswith("): name a file in a folder that is there")


def test_a_folder_for_runs_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    resource = RESOURCE + "  resources: {gpusPerNode: 0}\n"
    done = _posttrain("run", _write(tmp_path, resource), "--state", "file/runs", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"{tmp_path}/file/runs/first cannot be written to (Not a directory): say where runs are kept with "
        "--state FOLDER or $POSTTRAIN_STATE\n"
    )


# --- What has run -----------------------------------------------------------------------------------------------------


def test_status_lists_the_runs(recorded: Path) -> None:
    lines = _posttrain("status", cwd=recorded).stdout.splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "STATE", "STEP", "METRIC", "ETA", "RESTARTS", "AGE"]
    assert [line.split()[0] for line in lines[1:]] == ["stratos-demo", "stratos-hot"]


def test_status_of_a_run_names_folders_of_this_machine(recorded: Path) -> None:
    lines = _posttrain("status", "stratos-demo", cwd=recorded).stdout.splitlines()
    rows = dict(line.split(":", 1) for line in lines[: lines.index("")])
    storage = "state/stratos-demo/storage"
    assert rows["Trained model"].strip() == f"{storage}/model"
    assert rows["Checkpoint"].strip().partition(" in ")[2].startswith(f"{storage}/checkpoint-")


def test_status_of_a_run_is_the_resource_itself_where_asked_for(recorded: Path) -> None:
    expected = build_recorded_run().to_data()
    written = _posttrain("status", "stratos-demo", "-o", "yaml", cwd=recorded).stdout
    assert [document.data for document in load_documents(written, origin="status")] == [expected]
    assert json.loads(_posttrain("status", "stratos-demo", "-o", "json", cwd=recorded).stdout) == expected


def test_an_unknown_run_is_refused_with_the_known_ones(recorded: Path) -> None:
    for arguments in (("status", "x"), ("logs", "x"), ("compare", "stratos-demo", "x")):
        done = _posttrain(*arguments, cwd=recorded)
        assert done.returncode == 2
        assert done.stderr == f"there is no run 'x' in {recorded}/state; there are: stratos-demo, stratos-hot\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "torchrun\n[rank 0] three\n[rank 1] four\n[rank 0] five\n"),
        (("--rank", "0"), "three\nfive\n"),
        (("--attempt", "1", "--rank", "1"), "two\n"),
        (("--attempt", "0"), "checked\n"),
        (("--follow", "--rank", "1"), "four\n"),
    ],
)
def test_logs_are_those_of_an_attempt_and_a_rank(arguments: tuple[str, ...], text: str, recorded: Path) -> None:
    done = _posttrain("logs", "stratos-demo", *arguments, cwd=recorded)
    assert (done.returncode, done.stdout) == (0, text)


def test_logs_of_an_attempt_that_never_was_name_those_that_were(recorded: Path) -> None:
    done = _posttrain("logs", "stratos-demo", "--attempt", "7", cwd=recorded)
    assert done.returncode == 2
    assert done.stderr == "run 'stratos-demo' has no log of attempt 7; there are logs of: 0, 1, 2 (0: prepare)\n"


def test_compare_prints_ends_and_differences_and_writes_the_page(recorded: Path) -> None:
    done = _posttrain("compare", "stratos-demo", "stratos-hot", "-o", "both.html", cwd=recorded)
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["stratos-demo", "stratos-hot"] in rows
    assert ["spec.sft.args.learning_rate", "4e-05", "0.0001"] in rows
    assert "<svg" in (recorded / "both.html").read_text()


def test_an_unknown_image_is_refused(tmp_path: Path) -> None:
    done = _posttrain("env", "nothing", cwd=tmp_path, environ={"POSTTRAIN_CACHE": str(tmp_path / "cache")})
    assert (done.returncode, done.stdout) == (2, "")
    assert "trainer" in done.stderr


def test_followed_logs_go_on_with_the_next_attempt_and_end_with_the_run(recorded: Path) -> None:
    folder = RunFolder(recorded / "state" / "stratos-demo")
    with locked(folder, command="posttrain run x.yaml"):
        follower = subprocess.Popen(
            [sys.executable, "-c", "from posttrain.cli import main; main()", "logs", "stratos-demo", "--follow"],
            env={**os.environ, "POSTTRAIN_STATE": str(recorded / "state")},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        lines = [follower.stdout.readline() for _ in range(3)]
        with folder.log_file("stratos-demo-a2-master-0").open("a") as log:
            log.write(" and a half\n")
        lines.append(follower.stdout.readline())
        folder.log_file("stratos-demo-a3-master-0").write_text("[rank 0] six\n")
        lines += [follower.stdout.readline() for _ in range(2)]
    rest, _ = follower.communicate(timeout=30)
    assert "".join(lines) == (
        "torchrun\n[rank 0] three\n[rank 1] four\n[rank 0] five and a half\n"
        "==> stratos-demo-a3-master-0 <==\n[rank 0] six\n"
    )
    assert (follower.returncode, rest) == (0, "")
