"""What prepare finds in the inputs of grpo, good and bad: one process of the trainer's environment runs all cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.grpo_checks import count_groups
from posttrain.contract.config import TrainingConfig
from posttrain.files import check_run, read_documents
from posttrain.plan.training_run import preview_training_run
from posttrain.settings import Settings
from tests.support.builders import T0
from tests.workloads._configs import build_grpo_config
from tests.workloads._prepare_configs import ROOT, run_cases, write_jsonl

pytestmark = pytest.mark.workloads

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SERVICES = {"E2B_API_URL": "http://127.0.0.1:9", "MORPH_BASE_URL": "http://127.0.0.1:9"}
OWN_CODE = {
    "good_rewards.py": "def fair(completions, answer, **columns):\n    return [float(a) for a in answer]\n",
    "bad_rewards.py": (
        "def fails(completions, answer, **columns):\n    return [int(a['x']) for a in answer]\n\n"
        "def few(completions, **columns):\n    return [1.0]\n\n"
        "def text(completions, **columns):\n    return ['high'] * len(completions)\n"
    ),
    "async_rewards.py": (
        "async def fair(completions, answer, **columns):\n    return [float(a) for a in answer]\n\n"
        "async def few(completions, **columns):\n    return [1.0]\n"
    ),
    "broken_rewards.py": "import nothing_of_the_kind\n",
    "strict_rewards.py": (
        "import torch\n\n\n"
        "def as_in_a_step(prompts, completions, completion_ids, answer, solution, posttrain_row, trainer_state,"
        " log_extra, log_metric):\n"
        "    assert trainer_state.global_step == 0 and posttrain_row == [0, 0, 1, 1, 2, 2], posttrain_row\n"
        "    log_extra('answer', answer)\n"
        "    log_metric('longest', 1.0)\n"
        "    return list(torch.tensor(answer).view(-1, 2).float().flatten())\n"
    ),
    "rollouts.py": (
        "def right(prompts, trainer):\n    return {}\n\n"
        "def three(prompts, trainer, tries):\n    return {}\n\n"
        "async def awaited(prompts, trainer):\n    return {}\n\n"
        "class Made:\n    pass\n\n"
        "made = Made()\n\n"
        "class Game:\n"
        "    def reset(self, **row):\n        return None\n\n"
        "    def guess(self, number: int) -> str:\n"
        "        'Say it.\\n\\nArgs:\\n    number: a number'\n"
        "        return 'no'\n\n"
        "class Mute(Game):\n"
        "    def shout(self, number):\n        return 'no'\n\n"
        "class Broken(Game):\n"
        "    def __init__(self):\n        raise OSError('no board')\n"
    ),
}


def contest_row(number: int) -> dict[str, Any]:
    """Return a row that reads both as a problem of Codeforces and as one of the IOI; every second one is incomplete."""
    return {
        "problem": "Add them up.",
        "language": "python",
        "official_tests": [{"input": "1 2", "output": "3"}],
        "official_tests_complete": number % 2 == 0,
        "generated_tests": 5,
        "time_limit": 1.0,
        "memory_limit": 256.0,
        "input_mode": "stdio",
        "id": "plants",
        "contest_id": "1",
        "test_names": ["1"],
        "test_cases": [{"test_name": "1", "test_input": "1 2", "test_output": "3"}],
        "grader_files": [["graders/manager.cpp", "int main() {}"]],
        "score_precision": 2,
    }


def planned_config(file: Path) -> TrainingConfig:
    """Return what the ranks of an example's run are told."""
    (document,) = read_documents(file)
    run = check_run(document, data=document.data)
    objects = preview_training_run(run, now=T0, settings=Settings())
    texts = [manifest["data"]["config.json"] for manifest in objects if "config.json" in manifest.get("data", {})]
    return TrainingConfig.from_json(texts[-1])


RECIPES = {file.stem: planned_config(file) for file in sorted((ROOT / "examples" / "open-r1").glob("*.yaml"))}


@pytest.fixture(scope="module")
def found(trainer_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every case found, by its name."""
    folder = tmp_path_factory.mktemp("prepare-grpo")
    sums = [{"problem": f"How much is {n} + 1?", "answer": n + 1, "solution": f"${n + 1}$"} for n in range(8)]
    rows = write_jsonl(folder / "rows.jsonl", sums)
    talks = write_jsonl(
        folder / "talks.jsonl",
        [{"problem": [{"role": "user", "content": f"{n}?"}], "prompt": "other", "solution": "1"} for n in range(8)],
    )
    long = write_jsonl(folder / "long.jsonl", [{**row, "problem": "What is this? " * 200} for row in sums])
    few_words = write_jsonl(folder / "few-words.jsonl", [{**row, "problem": "What is this? " * 20} for row in sums])
    bare = write_jsonl(folder / "bare.jsonl", [{"problem": "?", "answer": 1} for _ in range(8)])
    bare_and_long = write_jsonl(folder / "bare-and-long.jsonl", [{"problem": "What is this? " * 200}])
    contests = write_jsonl(folder / "contests.jsonl", [contest_row(number) for number in range(4)])
    solvable = write_jsonl(folder / "solvable.jsonl", [{**contest_row(n), "grader_files": []} for n in range(4)])
    for name, text in OWN_CODE.items():
        file = folder / "code" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    gpt2 = folder / "gpt2"
    shutil.copytree(tiny_model, gpt2)
    (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_head": 3, "n_layer": 1}))

    def case(
        name: str, *rewards: dict[str, Any], rows: Path = rows, model: Path = tiny_model, **more: Any
    ) -> dict[str, Any]:
        given = list(rewards) or [{"name": "accuracy"}]
        gpu_memory = more.pop("gpu_memory", None)
        config = build_grpo_config(model=model, rows=rows, rewards=given, **more)
        config = config.model_copy(update={"gpu_memory_bytes": gpu_memory})
        sandbox = config.spec.used_sandbox
        urls = ",".join(sandbox.endpoints or ["http://127.0.0.1:9"]) if sandbox is not None else ""
        environ = {"environ": {"POSTTRAIN_SANDBOX_URLS": urls, "POSTTRAIN_SANDBOX_KEY": "e2b_x", **SERVICES}}
        return {"name": name, "config": config, "code": str(folder / "code"), **environ}

    cases = [
        case("good", {"name": "accuracy"}, {"function": "good_rewards:fair"}, systemPrompt="Think."),
        case("conversations", rows=talks, systemPrompt="Think."),
        case("no column", promptColumn="problm"),
        case("not text", promptColumn="answer"),
        case("no solution", {"name": "code_format"}, {"name": "cosine"}, rows=bare),
        case("long", rows=long),
        case("nearly long", args={"max_completion_length": 500}),
        case("vllm elsewhere", grpo={"rollout": {"mode": "Colocate"}}, args={"vllm_max_model_length": 20}),
        case("servers elsewhere", grpo={"rollout": {"mode": "Server", "server": {
            "gpusPerNode": 0, "maxModelLength": 20, "args": {"seed": 1}
        }}}),
        case(
            "unseen weights",
            grpo={"rollout": {"mode": "Colocate"}},
            args={"vllm_importance_sampling_correction": False},
        ),
        case("too many parts", grpo={"rollout": {"mode": "Server", "server": {
            "gpusPerNode": 0, "tensorParallelSize": 4
        }}}),
        case("too many nodes", grpo={"rollout": {"mode": "Server", "server": {
            "gpusPerNode": 0, "nodesPerReplica": 3
        }}}),
        case("no room", gpu_memory=100_000, resources={"gpusPerNode": 1}, grpo={"rollout": {"mode": "Server"}}),
        case("other names", model=gpt2, grpo={"rollout": {"mode": "Server", "server": {
            "gpusPerNode": 0, "tensorParallelSize": 2
        }}}),
        case("few rows", args={"per_device_train_batch_size": 32}),
        case("does not import", {"function": "broken_rewards:score"}),
        case(
            "own rewards fail",
            {"function": "bad_rewards:fails"},
            {"function": "bad_rewards:few"},
            {"function": "bad_rewards:text"},
        ),
        case("a server that is none", {"name": "code"}, grpo={
            "sandbox": {"mode": "Piston", "endpoints": ["http://127.0.0.1:9"]}
        }),
        case("a service that is none", {"name": "code"}, grpo={
            "sandbox": {"mode": "Morph", "apiKeySecretRef": {"name": "morph", "key": "k"}, "template": "snapshot_x"}
        }),
        case("async", {"function": "async_rewards:fair"}, {"function": "async_rewards:few"}),
        case("strict", {"function": "strict_rewards:as_in_a_step"}),
        case("rollouts", {"name": "cosine"}, {"function": "bad_rewards:fails"}, rows=write_jsonl(
            folder / "unsolved.jsonl", [{"problem": "?", "answer": 1} for _ in range(8)]
        ), grpo={"rolloutFunction": "rollouts:right"}),
        *(
            case(name, grpo={"rolloutFunction": name})
            for name in (
                *("rollouts:three", "rollouts:awaited", "rollouts:Made", "rollouts:made", "rollouts:other"),
                *("rollouts:Game", "rollouts:Mute", "rollouts:Broken"),
            )
        ),
        case("together", grpo={"rolloutFunction": "rollouts:Game"}, ranks=2, parallelism={"strategy": "ZeRO3"}),
        case("contests", {"name": "cf_code"}, {"name": "ioi_code"}, rows=contests),
        case("contests with tests", {"name": "cf_code"}, rows=contests, podOverrides={
            "env": [{"name": "CF_TESTS_FOLDER", "value": "/tests"}]
        }),
        case("cispo", args={"loss_type": "cispo"}),
        case("cispo with a bound", args={"loss_type": "cispo", "epsilon_high": 5.0}),
        case("evaluated", {"name": "cosine"}, {"function": "good_rewards:fair"}, held_out=rows, args=EVALUATED),
        case("evaluated without a column", {"name": "code_format"}, {"name": "cosine"}, held_out=bare, args=EVALUATED),
        case("an own reward is evaluated", {"function": "good_rewards:fair"}, held_out=talks, args=EVALUATED),
        case("long ones are evaluated", held_out=long, args=EVALUATED),
        case("servers for evaluation", held_out=few_words, args=EVALUATED, grpo={"rollout": {
            "mode": "Server", "server": {"gpusPerNode": 0, "maxModelLength": 110}
        }}),
        case("a fraction of long ones is evaluated", rows=long, args=EVALUATED, testFraction="0.5"),
        case("contests are evaluated", {"name": "ioi_code"}, rows=solvable, held_out=contests, args=EVALUATED),
        case("evaluated at the start", {"name": "cosine"}, held_out=bare, args={"eval_on_start": True}),
        case("held out for nothing", {"name": "cosine"}, {"function": "good_rewards:fair"}, held_out=bare_and_long),
        case("reference", args={"beta": 0.1}, model_fields={"config": {"rope_theta": 5.0}}),
    ]  # fmt: skip
    cases += [{"name": name, "what": "args", "config": config} for name, config in RECIPES.items()]
    return run_cases(cases, python=trainer_python, folder=folder)


@pytest.mark.parametrize("name", RECIPES)
def test_the_arguments_of_a_recipe_are_taken_for_the_ranks_that_it_asks_for(found: dict[str, Any], name: str) -> None:
    """TRL counts ranks by the processes that there are, and prepare is one."""
    assert found[name]["problems"] == []
    config = RECIPES[name]
    if config.method == "grpo":
        groups = count_groups(config.args, world_size=config.gang.world_size)
        assert groups is not None
        assert found[name]["effective_args"]["generation_batch_size"] == groups.of_all


def test_good_inputs_give_no_problem_and_a_forecast(found: dict[str, Any]) -> None:
    good = found["good"]
    assert good["problems"] == []
    assert good["estimates"] == {
        "longest prompt": good["estimates"]["longest prompt"],
        "prompts": "8",
        "completions of a rollout": "4, of 2 prompts",
        "steps per epoch": "4",
        "steps": "4",
        "epochs": "1",
    }
    assert good["samples"][0]["text"].startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nHow much is")
    assert good["samples"][0]["text"].endswith("<|im_start|>assistant\n")
    assert good["effective_args"]["reward_weights"] == [1.0, 1.0]


def test_conversations_are_taken_as_they_are_with_the_system_message(found: dict[str, Any]) -> None:
    assert found["conversations"]["problems"] == []
    assert "system\nThink.<|im_end|>\n<|im_start|>user\n" in found["conversations"]["samples"][0]["text"]


BAD = [
    ("no column", "DatasetColumnMissing", "there is no column problm with prompts; the data has problem, answer, sol"),
    ("no column", "DatasetColumnMissing", "did you mean problem?"),
    ("not text", "DatasetColumnMissing", "column answer holds something else, and a prompt is text or a list of"),
    ("no solution", "DatasetColumnMissing", "spec.grpo.rewards[1]: reward cosine reads the column solution, and spec"),
    ("long", "DatasetRowsInvalid", "tokens, and the model sees 512 (max_position_embeddings): leave such rows out"),
    ("few rows", "BatchNotDivisible", "a rollout takes 16 prompts (32 completions, 2 of each prompt), and the data"),
    ("does not import", "CodeImportFailed", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
    ("own rewards fail", "RewardFunctionFailed", "spec.grpo.rewards[0].function: bad_rewards:fails fails on 6 complet"),
    ("own rewards fail", "RewardFunctionFailed", "completions of the first rows of spec.datasets (columns answer, s"),
    ("own rewards fail", "RewardFunctionFailed", "TypeError: 'int' object is not subscriptable"),
    ("own rewards fail", "RewardFunctionFailed", "bad_rewards:few returns 1 values for 6 completions"),
    ("own rewards fail", "RewardFunctionFailed", "bad_rewards:text returns 'high' for 6 completions"),
    ("a server that is none", "SandboxUnreachable", "the sandbox http://127.0.0.1:9/api/v2 does not answer as Piston"),
    ("a service that is none", "SandboxUnreachable", "spec.grpo.sandbox: no machine of Morph ran it in 3 attempts; th"),
    ("a server that is none", "DatasetColumnMissing", "reward code reads the column verification_info"),
    ("async", "RewardFunctionFailed", "spec.grpo.rewards[1].function: async_rewards:few returns 1 values for 6 comp"),
    ("vllm elsewhere", "PackageMissing", "spec.grpo.rollout.mode: Colocate needs the package vllm, which is not inst"),
    ("vllm elsewhere", "ConfigInvalid", "spec.grpo.args.vllm_max_model_length: 20 tokens are fewer than the longest p"),
    ("servers elsewhere", "ConfigInvalid", "spec.grpo.rollout.server.maxModelLength: 20 tokens are fewer than the lon"),
    ("too many parts", "ConfigInvalid", "spec.grpo.rollout.server.tensorParallelSize: vLLM splits the model (num_att"),
    ("too many parts", "ConfigInvalid", "over 4 GPUs or processes, and each has to get as much: write 1 or 2"),
    ("too many nodes", "ConfigInvalid", "each has to get as much: write nodesPerReplica: 1 (and"),
    ("no room", "EstimateExceedsMemory", "spec.grpo.rollout.server: the weights in float32 take "),
    ("other names", "ConfigInvalid", "vLLM splits the model (num_attention_heads 3) over 2 GPUs or processes, and"),
    ("rollouts:three", "CodeImportFailed", "calls rollouts:three(prompts, trainer): missing a required argument: 'tri"),
    ("rollouts:awaited", "CodeImportFailed", "rollouts:awaited is async def, and the trainer does not await it"),
    ("rollouts:Made", "CodeImportFailed", "rollouts:Made is a class without a method reset, which begins an episode"),
    ("rollouts:made", "CodeImportFailed", "rollouts:made is of type Made, and it takes a function of prompts and tra"),
    ("rollouts:Game", "ConfigInvalid", "the model's chat template knows no tools: name one of TRL's in spec.model.ch"),
    ("rollouts:Mute", "CodeImportFailed", "Mute.shout cannot be shown to the model as a tool: "),
    ("rollouts:Broken", "CodeImportFailed", "OSError: no board"),
    ("together", "ConfigInvalid", "with spec.parallelism.strategy: ZeRO3 the ranks generate together, and would wai"),
    ("rollouts:other", "CodeImportFailed", "spec.grpo.rolloutFunction: module rollouts has no other; it defines Brok"),
    ("evaluated without a column", "DatasetColumnMissing", "rewards[1]: reward cosine reads the column solution, and "
     "spec.evalDatasets has answer: rename one with spec.evalDatasets[].rename: {answer: solution}"),
    ("evaluated at the start", "DatasetColumnMissing", "reads the column solution, and spec.evalDatasets has answer"),
    ("an own reward is evaluated", "RewardFunctionFailed", "good_rewards:fair fails on 6 completions of the first rows "
     "of spec.evalDatasets (columns solution and posttrain_row)"),
    ("long ones are evaluated", "DatasetRowsInvalid", "spec.evalDatasets: the longest prompt has"),
    ("a fraction of long ones is evaluated", "DatasetRowsInvalid", "spec.testFraction: the longest prompt has"),
    ("servers for evaluation", "ConfigInvalid", "are fewer than the longest prompt of spec.evalDatasets ("),
    ("contests are evaluated", "DatasetRowsInvalid", "no score for 4 of the first 4 rows of spec.evalDatasets. "),
    ("reference", "ConfigInvalid", "the reference model is loaded without the overrides of spec.model.config"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "reason", "said"), BAD)
def test_a_problem_is_named_with_its_reason_and_its_remedy(
    found: dict[str, Any], case: str, reason: str, said: str
) -> None:
    assert any(problem.startswith(f"{reason}: ") and said in problem for problem in found[case]["problems"])


@pytest.mark.parametrize("case", ["evaluated", "held out for nothing"])
def test_held_out_rows_are_looked_at_where_they_are_evaluated(found: dict[str, Any], case: str) -> None:
    assert found[case]["problems"] == []


@pytest.mark.parametrize("case", ["evaluated without a column", "long ones are evaluated", "contests are evaluated"])
def test_what_is_wrong_with_held_out_rows_alone_is_told_once(found: dict[str, Any], case: str) -> None:
    assert len(found[case]["problems"]) == 1


def test_a_completion_that_may_outgrow_the_model_is_a_warning(found: dict[str, Any]) -> None:
    assert found["nearly long"]["problems"] == []
    assert "max_completion_length 500 are together more than the 512 tokens" in found["nearly long"]["warnings"][0]


def test_an_own_reward_is_handed_what_a_step_hands_it(found: dict[str, Any]) -> None:
    assert found["strict"]["problems"] == []


def test_what_a_rollout_function_may_add_is_not_missed_but_told(found: dict[str, Any]) -> None:
    assert found["rollouts"]["problems"] == []
    missing, failing = found["rollouts"]["warnings"]
    assert missing.endswith(
        "rewards[0]: reward cosine reads the column solution, and spec.datasets has answer: rollouts:right has to "
        "return it, with a value for each completion"
    )
    assert "bad_rewards:fails fails on 6 completions" in failing
    assert failing.endswith("If it needs what rollouts:right returns, nothing is wrong")


def test_an_async_reward_is_tried_like_any_other(found: dict[str, Any]) -> None:
    assert len(found["async"]["problems"]) == 1


def test_problems_of_contests_that_have_no_score_are_found_before_anybody_solves_them(found: dict[str, Any]) -> None:
    (problem,) = found["contests"]["problems"]
    assert problem.startswith("DatasetRowsInvalid: spec.grpo.rewards[1]: reward ioi_code has no score for 4 of the fir")
    assert "plants has a manager, which talks with the solution" in problem
    (warning,) = found["contests"]["warnings"]
    assert warning.startswith("spec.grpo.rewards[0]: reward cf_code has no score for 2 of the first 4 rows of")
    assert warning.endswith("name the folder that holds them in $CF_TESTS_FOLDER")

    with_tests = found["contests with tests"]
    assert (with_tests["problems"], with_tests["warnings"]) == ([], [])


def test_cispo_without_its_own_bound_is_a_warning(found: dict[str, Any]) -> None:
    assert found["cispo"]["problems"] == []
    assert "spec.grpo.args.epsilon_high is not set, and loss_type cispo takes it for" in found["cispo"]["warnings"][0]
    assert found["cispo with a bound"]["warnings"] == []


def test_a_run_in_which_nobody_sees_stale_weights_is_warned_of(found: dict[str, Any]) -> None:
    assert "if vLLM generates with other weights, it is not noticed" in found["unseen weights"]["warnings"][0]
