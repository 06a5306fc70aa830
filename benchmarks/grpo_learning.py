"""Whether GRPO teaches: the mean reward of a run's last tenth of steps against that of its first, over several seeds.

    .venv/bin/python benchmarks/grpo_learning.py [--seeds 3] [--steps 100] [--out docs/development/grpo-learning.svg]

Each seed is a `posttrain run` of the quickstart's real model on sums of two digits (reasoning-gym's chain_sum), of
which it is never shown an answer. The reward is that task's own score of the whole completion: 1 for the right number
and nothing else; for a text with the number in it, the share that the number is of the text. It ends with code 1 unless
the gain, the mean over the seeds, is more than the noise: the standard deviation over the seeds, of the first and the
last tenth together. `--out` draws the curves.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
TERMS, DIGITS = 2, 1
ROWS = 2000
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""The problem alone, for the model to go on from: its own template has four times as many tokens."""
BLOCKS = 10
"""Points of a curve: each the mean over as many steps as the others."""
COLOURS = ("#2b66b1", "#c2571a", "#2c7a4b", "#8a4fb0", "#9a6a00", "#5c6672")


def main() -> None:
    """Train, draw, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="an SVG file for the curves")
    options = parser.parse_args()
    if options.seeds < 2 or options.steps < BLOCKS:
        parser.error(f"noise needs two seeds, and a curve {BLOCKS} steps")

    sys.path.insert(0, str(QUICKSTART))
    from make_inputs import install_packages, trainer_interpreter

    subprocess.run([sys.executable, QUICKSTART / "make_inputs.py"], stdout=sys.stderr, check=True)
    interpreter = trainer_interpreter()
    packages = install_packages(interpreter)
    curves = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "sums.jsonl"
        command = [interpreter, "-c", "import grpo_learning; grpo_learning.write_rows()", rows]
        python_path = os.pathsep.join(map(str, (Path(__file__).parent, QUICKSTART, packages)))
        subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path}, check=True)
        for seed in range(1, options.seeds + 1):
            curves.append(train(seed, steps=options.steps, rows=rows, packages=packages, folder=Path(folder)))
            print(f"seed {seed}: {tell(curves[-1])}", file=sys.stderr, flush=True)
    first, last = ([tenth(curve)[index] for curve in curves] for index in (0, 1))
    gain = statistics.mean(last) - statistics.mean(first)
    noise = (statistics.variance(first) + statistics.variance(last)) ** 0.5
    if options.out is not None:
        options.out.write_text(draw(curves), encoding="utf-8")
    print(
        f"GRPO on sums of two digits: mean reward {statistics.mean(first):.3f} over the first tenth of "
        f"{options.steps} steps, {statistics.mean(last):.3f} over the last ({'; '.join(map(tell, curves))}); a gain of "
        f"{gain:.3f}, {gain / noise:.1f} times the noise over {options.seeds} seeds ({noise:.3f})"
    )
    sys.exit(gain <= noise)


def train(seed: int, *, steps: int, rows: Path, packages: Path, folder: Path) -> list[float]:
    """Train once, and return the mean reward of each step."""
    from posttrain.local.records import read_records
    from posttrain.local.state import RunFolder

    name = f"learning-{seed}"
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(build_run(name, seed=seed, steps=steps, rows=rows, packages=packages)))
    posttrain = Path(sys.executable).with_name("posttrain")
    command = [posttrain, "run", file, "--plain", "--state", folder / "state"]
    subprocess.run(command, stdout=sys.stderr, check=True)
    run = RunFolder(folder / "state" / name)
    history = read_records(run.storage).history
    rewards = [numbers["reward"] for numbers in history.values() if "reward" in numbers]
    if len(rewards) != steps:
        raise SystemExit(f"{name} logged {len(rewards)} rewards in {steps} steps")
    subprocess.run(["rm", "-r", run.path], check=True)
    return rewards


def build_run(name: str, *, seed: int, steps: int, rows: Path, packages: Path) -> dict[str, Any]:
    """Return the TrainingRun of a seed."""
    score = {"function": "grpo_learning:score", "params": {"folders": [str(QUICKSTART), str(packages)]}}
    return {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {
            "model": {
                "source": f"file://{QUICKSTART / 'inputs' / 'model'}",
                "dtype": "float32",
                "chatTemplate": TEMPLATE,
            },
            "datasets": [{"source": f"file://{rows}"}],
            "datasetSeed": seed,
            "promptColumn": "question",
            "code": {"path": str(Path(__file__).parent)},
            "grpo": {
                "rewards": [score],
                "args": {
                    "max_steps": steps,
                    "seed": seed,
                    "per_device_train_batch_size": 8,
                    "num_generations": 4,
                    "max_completion_length": 6,
                    "learning_rate": 0.0002,
                    "lr_scheduler_type": "constant",
                    "bf16": False,
                    "activation_checkpointing": False,
                    "logging_steps": 1,
                },
            },
            "peft": {"method": "LoRA", "rank": 16, "dropout": "0"},  # half of a step of all weights, on a CPU
            "prepare": {"enabled": False},
            "resources": {"gpusPerNode": 0, "cpu": "1"},
            "checkpoints": {"everySteps": steps},
        },
    }


def tenth(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and the last tenth."""
    count = max(len(rewards) // 10, 1)
    return statistics.mean(rewards[:count]), statistics.mean(rewards[-count:])


def tell(rewards: Sequence[float]) -> str:
    """Return these in words."""
    first, last = tenth(rewards)
    return f"{first:.3f} to {last:.3f}"


def draw(curves: Sequence[Sequence[float]]) -> str:
    """Return the curves as an SVG picture that needs nothing else."""
    from posttrain.local.curves import Line, build_chart

    block = len(curves[0]) // BLOCKS
    lines = [
        Line(
            name=f"seed {seed}",
            points=tuple(
                (end, statistics.mean(rewards[end - block : end])) for end in range(block, len(rewards) + 1, block)
            ),
        )
        for seed, rewards in enumerate(curves, start=1)
    ]
    chart = build_chart(lines, title="Mean reward", from_zero=True, width=760, height=340)
    assert chart is not None
    top = 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {chart.height + top + 22}" '
        'font-family="system-ui, Liberation Sans, sans-serif" font-size="12" fill="#6a6f78">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{chart.left:.0f}" y="22" font-size="14" fill="#23262b">Mean reward of the completions of '
        f"{block} steps</text>",
        *(
            f'<text x="{chart.right - 70 * (len(lines) - 1 - index):.0f}" y="22" text-anchor="end" '
            f'fill="{COLOURS[index % len(COLOURS)]}">{escape(line.name)}</text>'
            for index, line in enumerate(lines)
        ),
        f'<g transform="translate(0 {top})">',
        *(
            f'<path d="M{chart.left:.1f} {tick.at}H{chart.right}" stroke="#e4e1db"/>'
            f'<text x="{chart.left - 8:.1f}" y="{tick.at + 4}" text-anchor="end">{tick.label}</text>'
            for tick in chart.y_ticks
        ),
        *(
            f'<text x="{tick.at}" y="{chart.bottom + 19}" text-anchor="middle">{tick.label}</text>'
            for tick in chart.x_ticks
        ),
        f'<text x="{chart.right}" y="{chart.bottom + 38}" text-anchor="end">step</text>',
    ]
    for index, line in enumerate(chart.lines):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<path d="{line.path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y, _ in line.dots]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


# What follows runs in the trainer's environment.


def write_rows() -> None:
    """Write the problems into the file that the command line names."""
    rows = [{"question": problem["question"], "answer": problem["answer"]} for problem in build_task()]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_task() -> Any:
    """Return the task: problems, and how an answer is scored."""
    from make_inputs import import_task

    task = import_task("arithmetic", "chain_sum")
    config = task.ChainSumConfig(
        min_terms=TERMS, max_terms=TERMS, min_digits=DIGITS, max_digits=DIGITS, seed=1, size=ROWS
    )
    return task.ChainSumDataset(config)


@functools.cache
def task_in(*folders: str) -> Any:
    """Return the task, imported from these folders."""
    sys.path += folders
    return build_task()


def score(*, completions: list[Any], answer: list[str], folders: list[str], **_: Any) -> list[float]:
    """Return the task's own score of each completion: the reward of the run."""
    task = task_in(*folders)
    return [
        task.score_answer(completion[0]["content"], {"answer": right})
        for completion, right in zip(completions, answer, strict=True)
    ]


if __name__ == "__main__":
    main()
