"""What grading mathematical answers takes, against the same grading one by one as open-r1 does it.

    .venv/bin/python benchmarks/reward_grading.py [--pairs 3] [--hostile-pairs 1] [--workers 2]

1,000 completions with 16,000 characters of reasoning before the answer: 63 solutions with 16 completions each, 1,000
different solutions, and the first with 2% answers that math-verify spends 5 s on. Each pair has completions of its own,
made from its number: SymPy would remember those of the pair before, as it cannot in a training. The plain
side parses solution and answer and compares them, one after the other, with math-verify's own time limits, as the main
thread must for them; ours is the reward `accuracy`, from a pool that is not started yet to the last grade. The rewards
are compared before a time is printed; a ratio is the median over the pairs, and what is the same in every pair is
measured in turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COUNT = 1000
GROUP = 16
REASONING = 16_000
Batch = tuple[list[str], list[str]]
"""Completions and their solutions."""


def main() -> None:
    """Measure, and print a line for each claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--hostile-pairs", type=int, default=1, help="with pathological answers (minutes each)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--python", type=Path, help="the trainer's interpreter (default: `posttrain env trainer`)")
    options = parser.parse_args()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("benchmarks", "operator", "workloads")),
    }
    task = {"pairs": options.pairs, "hostile_pairs": options.hostile_pairs, "workers": options.workers}
    command = [options.python or trainer_interpreter(), "-c", "import reward_grading; reward_grading.measure()"]
    subprocess.run(command, env=environment, input=json.dumps(task), text=True, check=True)


def trainer_interpreter() -> str:
    """Return the interpreter of the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(output.splitlines()[-1])


# What follows runs in the trainer's environment.


def measure() -> None:
    """Measure what is asked for on standard input."""
    import math_verify  # noqa: F401 - the plain side needs it, too, and its import is not what is measured there

    logging.disable()  # math-verify warns of each answer; writing that is no grading
    task = json.load(sys.stdin)
    claims = (
        (f"{COUNT // GROUP + 1} solutions x {GROUP}", repeated_golds, task["pairs"], 4),
        ("no solution twice", different_golds, task["pairs"], 2),
        (f"{COUNT // GROUP + 1} solutions x {GROUP}, 2% pathological answers", hostile, task["hostile_pairs"], 8),
    )
    for name, make_batch, pairs, wanted in (claim for claim in claims if claim[2]):
        print(compare(name, make_batch, pairs=pairs, wanted=wanted, workers=task["workers"]), flush=True)


def compare(name: str, make_batch: Callable[[random.Random], Batch], *, pairs: int, wanted: int, workers: int) -> str:
    """Time both sides in turn, and return the line that tells it."""
    times: dict[int, list[Time]] = {0: [], workers: [], 1: []}  # by the number of workers; 0 is the plain loop
    for seed in range(pairs):
        batch = make_batch(random.Random(seed))
        plain, time_taken = timed(functools.partial(grade_plainly, *batch))
        times[0].append(time_taken)
        for count in dict.fromkeys((workers, 1)):
            rewards, time_taken = timed(functools.partial(grade_in_pool, *batch, workers=count))
            times[count].append(time_taken)
            equal = sum(ours == theirs for ours, theirs in zip(rewards, plain, strict=True))
            if equal < COUNT:
                raise SystemExit(f"{name}: only {equal} of {COUNT} rewards are equal with {count} workers")
    ratios = {
        count: sorted(slow.wall / fast.wall for slow, fast in zip(times[0], taken, strict=True))
        for count, taken in times.items()
    }
    ratio = {count: statistics.median(each) for count, each in ratios.items()}
    wall, cpu = (
        {count: f"{statistics.median(getattr(one, kind) for one in taken):.1f} s" for count, taken in times.items()}
        for kind in ("wall", "cpu")
    )
    return (
        f"accuracy of {COUNT} completions ({name}) against open-r1's loop: {ratio[workers]:.1f}x with {workers} "
        f"workers (wanted: {wanted}x), {ratio[1]:.1f}x with 1; {wall[0]} against {wall[workers]} and {wall[1]}, "
        f"start-up included (processor time {cpu[0]} against {cpu[workers]} and {cpu[1]}); {COUNT} of {COUNT} equal, "
        f"no process left; median of {pairs} ({ratios[workers][0]:.1f}x to {ratios[workers][-1]:.1f}x)"
    )


class Time(NamedTuple):
    """What something took, in seconds: by the clock, and of the processors."""

    wall: float
    cpu: float


def timed(grade: Callable[[], list[float | None]]) -> tuple[list[float | None], Time]:
    """Return what `grade` returns, and the time that it took, with that of the processes that it started and ended."""
    wall, cpu = time.perf_counter(), used_cpu()
    rewards = grade()
    return rewards, Time(time.perf_counter() - wall, used_cpu() - cpu)


def used_cpu() -> float:
    """Return the processor time of this process and of those that it has waited for, and they for theirs."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def grade_plainly(completions: list[str], golds: list[str]) -> list[float | None]:
    """Return the rewards of a loop that parses and compares in the main thread."""
    from math_verify import parse, verify

    from posttrain_workloads.rewards.grader import answer_config

    config = answer_config("all")
    rewards: list[float | None] = []
    for completion, gold in zip(completions, golds, strict=True):
        parsed = parse(gold, extraction_mode="first_match")
        if not parsed:
            rewards.append(None)
            continue
        answer = parse(completion, extraction_config=config, extraction_mode="first_match")
        try:
            rewards.append(float(verify(parsed, answer)))
        except Exception:  # the loop that is compared with has none there
            rewards.append(None)
    return rewards


def grade_in_pool(completions: list[str], golds: list[str], *, workers: int) -> list[float | None]:
    """Return the rewards of `accuracy`, with a pool of its own that is started for it."""
    from posttrain.local.shim import descendants
    from posttrain_workloads.rewards import accuracy
    from posttrain_workloads.rewards.grading import GradingPool, share_pool

    pool = GradingPool(workers)
    share_pool(pool)
    rewards = accuracy([""] * len(completions), completions, [[]] * len(completions), solution=golds)
    processes = descendants(os.getpid())
    pool.close()
    if left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        raise SystemExit(f"processes are left: {left} of {processes}")
    return rewards


# --- The completions --------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A solution, and how a model that is right writes it."""

    gold: str
    right: str


def repeated_golds(draw: random.Random) -> Batch:
    """Return completions in groups: right ones, wrong ones, and some without an answer."""
    problems = [make_problem(draw) for _ in range(COUNT // GROUP + 1)]
    pairs = [(make_completion(problem, draw), problem.gold) for problem in problems for _ in range(GROUP)][:COUNT]
    return [completion for completion, _ in pairs], [gold for _, gold in pairs]


def different_golds(draw: random.Random) -> Batch:
    """Return completions of as many problems."""
    problems: dict[str, Problem] = {}
    while len(problems) < COUNT:
        problem = make_problem(draw)
        problems[problem.gold] = problem
    return [make_completion(problem, draw) for problem in problems.values()], list(problems)


def hostile(draw: random.Random) -> Batch:
    """Return completions in groups, every fiftieth with an answer that takes longer than any time limit."""
    completions, golds = repeated_golds(draw)
    for number, at in enumerate(range(7, COUNT, COUNT // 20)):
        answer = PATHOLOGICAL[number % len(PATHOLOGICAL)] % number
        completions[at] = f"{make_reasoning(draw)}\n</think>\n\nSo it is $\\boxed{{{answer}}}$."
    return completions, golds


PATHOLOGICAL = (
    "9^{9^{9}} + %d",
    "9^{9^{9^{9}}} + %d",
    "10^{10^{10}} + %d",
    "(10^{8})! + %d",
    "3^{10^{8}} + %d",
    r"\sum_{k=1}^{10^9} \frac{1}{k^2} + %d",
    "(" * 400 + "x + %d" + ")" * 400,
)


def make_problem(draw: random.Random) -> Problem:
    """Return a solution: six of ten are integers, two simple, two harder."""
    a, b, c = draw.randint(11, 99), draw.randint(2, 9), draw.randint(2, 9)
    simple = (rf"\frac{{{a}}}{{{b}}}", f"{a}.{b}", rf"{c}\sqrt{{{a}}}", rf"\frac{{{a}\pi}}{{{b}}}")
    hard = (
        (rf"[-{a}, {b}) \cup ({a}, \infty)",) * 2,
        (rf"\frac{{{a} + {c}\sqrt{{{b}}}}}{{2}}", rf"\frac{{{a}}}{{2}} + \frac{{{c}\sqrt{{{b}}}}}{{2}}"),
        (rf"(x+{a})(x-{b})", f"x^2 + {a - b}x - {a * b}"),
        (rf"\{{{a}, {b}, -{c}\}}", rf"\{{-{c}, {b}, {a}\}}"),
        (rf"y = {c}x + \frac{{{a}}}{{{b}}}", f"{b}y = {b * c}x + {a}"),
        (rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 1 \end{{pmatrix}}",) * 2,
        (rf"\frac{{\sqrt{{{a}}}+{b}}}{{\sqrt{{7}}-2}}", rf"\frac{{(\sqrt{{{a}}}+{b})(\sqrt{{7}}+2)}}{{3}}"),
        (rf"{2 * c}\sin^2(x) - {a}", rf"{c - a} - {c}\cos(2x)"),
        (rf"\left({a}, \frac{{{b}}}{{{c}}}\right)",) * 2,
        (rf"\frac{{x^2 + {a}x + {b}}}{{(x-{c})(x+{b})}}",) * 2,
    )
    kind = draw.random()
    gold, right = (str(a * 1000 + 10 * b + c),) * 2
    if kind > 0.8:
        gold, right = draw.choice(hard)
    elif kind > 0.6:
        gold = right = draw.choice(simple)
    return Problem(f"${gold}$", right)


def make_completion(problem: Problem, draw: random.Random) -> str:
    """Return reasoning and an answer: half are right, most errors are made by several, a few end early."""
    usual_error = random.Random(problem.gold).randint(1, 3)
    kind = draw.random()
    if kind > 0.97:
        return make_reasoning(draw)
    wrong = f"{problem.right} + {usual_error}" if kind < 0.9 else f"{draw.randint(1, 20)}"
    answer = problem.right if kind < 0.5 else wrong
    ends = (
        f"The final answer is $\\boxed{{{answer}}}$.",
        f"\\[\n\\boxed{{{answer}}}\n\\]",
        f"**\\boxed{{{answer}}}**",
    )
    return f"{make_reasoning(draw)}\n</think>\n\n{draw.choices(ends, weights=(18, 1, 1))[0]}"


def make_reasoning(draw: random.Random) -> str:
    """Return a long text with formulas in it, and now and then a box."""
    parts = ["<think>\n"]
    size = 0
    while size < REASONING:
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        part = draw.choice(
            (
                f"Let me see: if $x = {a}$ then $x + {b} = {a + b}$, which does not help much. ",
                f"Wait, that is not right. Trying {a} instead of {b}, I get a contradiction.\n\n",
                rf"We have \[ \frac{{{a}}}{{{b}}} + y = {b} \] and so the other root must be larger. ",
                "Alternatively, think of the problem as counting paths on a grid and use symmetry.\n",
                f"Step {a}: substitute, multiply by {b} and compare both sides. ",
                rf"So perhaps the answer is $\boxed{{{a}}}$, but let me check that again. "
                if draw.random() < 0.1
                else "Hmm. ",
            )
        )
        parts.append(part)
        size += len(part)
    return "".join(parts)


if __name__ == "__main__":
    main()
