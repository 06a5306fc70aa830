"""What the tests in the images' environments share: their interpreters, the quickstart's model, a tiny one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from posttrain.local.environments import ensure_environment

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain")
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="session")
def trainer_python() -> Path:
    """The interpreter of the trainer's environment, which is made on first use (minutes)."""
    return ensure_environment("trainer", cache=CACHE, report=lambda line: print(line, file=sys.stderr))


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment for CPUs, also where there are GPUs; made on first use (minutes)."""
    return ensure_environment("vllm", cache=CACHE, report=lambda line: print(line, file=sys.stderr), nvidia=False)


def ensure_quickstart_inputs() -> Path:
    """Return the folder of the quickstart's inputs: model/, train.jsonl, heldout.jsonl."""
    subprocess.run([sys.executable, QUICKSTART / "make_inputs.py"], check=True, stdout=subprocess.DEVNULL)
    return QUICKSTART / "inputs"


@pytest.fixture(scope="session")
def quickstart_inputs(trainer_python: Path) -> Path:
    """The quickstart's inputs."""
    return ensure_quickstart_inputs()


@pytest.fixture(scope="session")
def quickstart_model(quickstart_inputs: Path) -> Path:
    """A real model: SmolLM2-135M-Instruct."""
    return quickstart_inputs / "model"


def ensure_tiny_model(python: Path, *, real: Path) -> Path:
    """Return a Llama of two layers with random weights, and the tokenizer and chat template of the real model."""
    script = Path(__file__).with_name("make_tiny_model.py")
    sources = [script, real / "tokenizer.json", real / "chat_template.jinja"]
    key = hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    folder = CACHE / f"tiny-model-{key}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"{folder.name}.") as making:
            target = Path(making) / "model"
            subprocess.run([python, script, real, target], check=True)
            try:
                target.rename(folder)
            except OSError:
                if not folder.exists():  # else another test process was faster, with the same content
                    raise
    return folder


@pytest.fixture(scope="session")
def tiny_model(trainer_python: Path, quickstart_model: Path) -> Path:
    """A tiny model that is trained in no time."""
    return ensure_tiny_model(trainer_python, real=quickstart_model)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, quickstart_inputs: Path) -> Path:
    """32 of the quickstart's problems, which a run of a few steps does not exhaust."""
    lines = (quickstart_inputs / "train.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(lines[:32]))
    return file


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory, quickstart_inputs: Path) -> Path:
    """Four other problems."""
    lines = (quickstart_inputs / "heldout.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path_factory.mktemp("held-out") / "held-out.jsonl"
    file.write_text("".join(lines[:4]))
    return file
