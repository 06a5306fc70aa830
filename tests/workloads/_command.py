"""`posttrain run` on one file, as a person starts it, and what can be seen of it meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.api.loader import dump_document
from posttrain.api.training_run import TrainingRun
from posttrain.contract.facts import FACT, Fact
from posttrain.local.state import RunFolder
from tests.support.processes import wait_for

POSTTRAIN = Path(sys.executable).with_name("posttrain")
WAIT_SECONDS = 240.0


@dataclass
class Command:
    """`posttrain run` on one file, in a folder of its own."""

    folder: Path
    spec: dict[str, Any]
    process: subprocess.Popen[str] | None = None
    wait_seconds: float = WAIT_SECONDS

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.folder / ".posttrain" / "tiny")

    def write(self) -> None:
        resource = {
            "apiVersion": "posttrain.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": "tiny"},
            "spec": self.spec,
        }
        self.folder.mkdir(exist_ok=True)
        (self.folder / "run.yaml").write_text(dump_document(resource))

    def start(self, *arguments: str) -> Command:
        self.write()
        environment = {name: value for name, value in os.environ.items() if name != "POSTTRAIN_STATE"}
        self.process = subprocess.Popen(
            [POSTTRAIN, "run", "run.yaml", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def wait(self) -> tuple[int, str]:
        assert self.process is not None
        try:
            output, _ = self.process.communicate(timeout=self.wait_seconds)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            output, _ = self.process.communicate(timeout=self.wait_seconds)
            raise AssertionError(f"it did not end in {self.wait_seconds} s:\n{output}\n{self.logs()}") from None
        return self.process.returncode, output

    def status(self) -> TrainingRun:
        run = self.run_folder.read_run()
        assert run is not None
        return run

    def facts(self) -> list[Fact]:
        """Return what the run's first node has told."""
        (file,) = self.run_folder.storage.glob("facts-*.jsonl")
        return [FACT.validate_json(line) for line in file.open("rb")]

    def logs(self) -> str:
        return "\n".join(f"{file}:\n{file.read_text()[-3000:]}" for file in sorted(self.run_folder.logs.glob("*.log")))

    def wait_for(self, look: Callable[[], object], *, what: str) -> None:
        """Wait for what happens while it runs."""

        def found() -> object:
            ended = self.process is None or self.process.poll() is not None
            seen = look()
            assert seen or not ended, f"it ended before {what}:\n{self.wait()[1]}\n{self.logs()}"
            return seen

        wait_for(found, what=f"{what}: {self.run_folder.path}", seconds=self.wait_seconds)

    def wait_for_checkpoint(self, step: int) -> None:
        marker = self.run_folder.storage / f"checkpoint-{step}" / ".posttrain-complete.json"
        self.wait_for(marker.exists, what=f"checkpoint {step}")

    def processes(self, *, rank: int | None = None, pod: str | None = None) -> list[int]:
        """Return the living processes of its pods, or only those of a rank or a pod, which their environment tells."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
            except OSError:
                continue
            variables = environment.split(b"\0")
            ours = f"={self.run_folder.pods}/".encode() in environment
            of_rank = rank is None or (f"RANK={rank}".encode() in variables and b"LOCAL_RANK=" in environment)
            of_pod = pod is None or f"POSTTRAIN_POD_NAME={pod}".encode() in variables
            if ours and of_rank and of_pod:
                found.append(int(process.name))
        return found

    def end(self) -> None:
        """End it, if it is still there, and wait until nothing of it is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        wait_for(lambda: not self.processes(), what="the end of every process", seconds=60)
