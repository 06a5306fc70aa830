"""What prepare finds in inputs, good and bad: one process of the trainer's environment runs all cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.result import ExitCode
from posttrain.local.records import read_records
from tests.workloads._configs import Pod, build_config
from tests.workloads._prepare_configs import CONVERSATIONS, build_case_config, run_cases, write_jsonl

pytestmark = pytest.mark.workloads

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
OWN_CODE = {
    "good_callbacks.py": "from transformers import TrainerCallback\n"
    "class Count(TrainerCallback):\n    def __init__(self, every):\n        self.every = every\n",
    "broken_callbacks.py": "import json\n\ndef parse():\n    return json.loads('{')\n\nVALUE = parse()\n",
    "good_trainers.py": "from trl import SFTTrainer\nclass Mine(SFTTrainer):\n    pass\nclass Other:\n    pass\n",
}


def copy_model(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    return target


@pytest.fixture(scope="module")
def found(trainer_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every case found, by its name."""
    folder = tmp_path_factory.mktemp("prepare")
    rows = {"source": f"file://{write_jsonl(folder / 'rows.jsonl', CONVERSATIONS)}"}
    pairs = write_jsonl(folder / "pairs.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)])
    long = write_jsonl(
        folder / "long.jsonl",
        [{"prompt": "What is this? " * 40, "completion": "It is long."} for _ in range(4)],
    )
    bad = write_jsonl(folder / "bad.jsonl", [*CONVERSATIONS[:3], {"messages": [{"role": "user", "content": None}]}])
    for name, text in OWN_CODE.items():
        write_code = folder / "code" / name
        write_code.parent.mkdir(exist_ok=True)
        write_code.write_text(text)
    no_template = copy_model(tiny_model, folder / "no-template", without=("chat_template.jinja",))
    no_tokenizer = copy_model(tiny_model, folder / "no-tokenizer", without=("tokenizer*", "chat_template.jinja"))
    pickled = copy_model(tiny_model, folder / "pickled", without=("*.safetensors",))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    cloned, copied = copy_model(tiny_model, folder / "cloned"), copy_model(tiny_model, folder / "copied")
    (cloned / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with (copied / "model.safetensors").open("r+b") as weights:
        weights.truncate(1_000_000)
    model = f"file://{tiny_model}"

    def case(name: str, *, model: str = model, datasets: Any = (rows,), **more: Any) -> dict[str, Any]:
        return {"name": name, "config": build_case_config(model=model, datasets=datasets, **more)}

    code = {"code": {"path": str(folder / "code")}}
    cases = [
        case("good", test_fraction="0.2", args={"eval_strategy": "epoch", "per_device_train_batch_size": 2}),
        case("marked", args={"assistant_only_loss": True}, model_fields={"chatTemplate": MARKED}),
        case("pairs", datasets=[{"source": f"file://{pairs}"}]),
        case("all of pairs", datasets=[{"source": f"file://{pairs}"}], args={"completion_only_loss": False}),
        case("packed", args={"packing": True, "max_steps": -1, "num_train_epochs": 2}),
        case("truncated", datasets=[{"source": f"file://{long}"}], args={"max_length": 16}),
        case("bad rows", datasets=[{"source": f"file://{bad}"}]),
        case("missing file", datasets=[{"source": f"file://{folder}/rosw.jsonl"}]),
        case("missing column", datasets=[{**rows, "columns": ["mesages"]}]),
        case("no tokenizer", model=f"file://{no_tokenizer}"),
        case("no template", model=f"file://{no_template}"),
        case("template given", model=f"file://{no_template}", model_fields={"chatTemplate": MARKED}),
        case("text needs no template", model=f"file://{no_template}", datasets=[{"source": f"file://{pairs}"}]),
        case("pickled", model=f"file://{pickled}"),
        case("cloned without weights", model=f"file://{cloned}"),
        case("half copied", model=f"file://{copied}"),
        case("modules", peft={"targetModules": ["q_proj", "mlp.up_proj"]}),
        case("misspelt module", peft={"targetModules": ["q_proj", "v_porj"]}),
        case("schedule", args={"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        case("half a schedule", args={"lr_scheduler_type": "cosine_with_min_lr"}),
        case("schedule misspelt", args={"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}),
        case("climbing", args={"learning_rate": -1e-4}),
        case("no model", model=f"file://{folder}/nothing"),
        case("eos", model_fields={"eosToken": "<|im_ends|>"}),
        case("refused by TRL", args={"warmup_steps": -1.0}),
        case("nothing to evaluate", args={"eval_strategy": "steps", "eval_steps": 1}),
        case("marks missing", args={"assistant_only_loss": True}, model_fields={"chatTemplate": UNMARKED}),
        {
            **case(
                "own code",
                callbacks=[{"function": "good_callbacks:Count", "params": {"every": 2}}],
                trainer_class="good_trainers:Mine",
                **code,
            ),
            "code": str(folder / "code"),
        },
        case("broken callback", callbacks=[{"function": "broken_callbacks:Count"}], **code),
        case("no such module", callbacks=[{"function": "nowhere:Count"}], **code),
        case("no such name", callbacks=[{"function": "good_callbacks:Cuont", "params": {}}], **code),
        case("wrong params", callbacks=[{"function": "good_callbacks:Count", "params": {"evry": 2}}], **code),
        case("no trainer", trainer_class="good_trainers:Other", **code),
        case(
            "split",
            args={"per_device_train_batch_size": 3, "accelerator_config": {"split_batches": True}},
            resources={"gpusPerNode": 0, "processesPerNode": 2},
        ),
        case(
            "packages",
            args={"optim": "galore_adamw"},
            model_fields={"attnImplementation": "flash_attention_2"},
        ),
        case("memory", resources={"gpusPerNode": 8}, parallelism={"strategy": "ZeRO3"}, gpu_memory=2**30),
        case("enough memory", resources={"gpusPerNode": 8}, parallelism={"strategy": "ZeRO3"}, gpu_memory=80 * 2**30),
        {
            "name": "everything at once",
            "config": build_case_config(
                model=f"file://{no_tokenizer}",
                datasets=[{"source": f"file://{folder}/a.jsonl"}, {**rows, "columns": ["mesages"]}],
                args={"warmup_steps": -1.0, "use_liger_kernel": True, "optim": "schedule_free_adamw"},
                callbacks=[{"function": "broken_callbacks:Count"}],
                **code,
            ),
        },
        case("disabled", model=f"file://{no_tokenizer}", prepare={"enabled": False}),
    ]
    return run_cases(cases, python=trainer_python, folder=folder)


def the_problem(found: dict[str, Any], name: str) -> str:
    [problem] = found[name]["problems"]
    return str(problem)


def test_good_inputs_pass_and_everything_is_worked_out(found: dict[str, Any]) -> None:
    good = found["good"]
    assert good["problems"] == []
    assert good["result"]["reason"] == "Prepared"
    assert good["estimates"]["rows"] == "16"
    assert good["estimates"]["global batch"] == "2 rows"
    assert good["estimates"]["steps per epoch"] == "8"
    assert good["estimates"]["steps"] == "2"
    assert good["commits"] == {}


def test_weights_that_are_not_whole_are_told_of_before_they_are_loaded(found: dict[str, Any]) -> None:
    assert "is a pointer of Git LFS" in the_problem(found, "cloned without weights")
    assert "run `git lfs pull`" in the_problem(found, "cloned without weights")
    assert "model.safetensors has 1,000,000 bytes, and should have" in the_problem(found, "half copied")


def test_modules_of_an_adapter_that_the_model_lacks_are_named_with_those_it_has(found: dict[str, Any]) -> None:
    assert found["modules"]["problems"] == []
    problem = the_problem(found, "misspelt module")
    assert "spec.peft.targetModules" in problem
    assert "has no module v_porj: did you mean v_proj? Its linear layers are called down_proj, gate_proj" in problem


def test_a_schedule_is_built_before_the_trainer_would(found: dict[str, Any]) -> None:
    assert found["schedule"]["problems"] == []
    assert "spec.sft.args.lr_scheduler_kwargs: lr_scheduler_type cosine_with_min_lr: " in the_problem(
        found, "half a schedule"
    )
    assert "min_lr_rate" in the_problem(found, "half a schedule")
    assert "num_cycle" in the_problem(found, "schedule misspelt")
    assert "spec.sft.args.learning_rate" in the_problem(found, "climbing")


def test_the_effective_arguments_are_those_of_the_real_class(found: dict[str, Any]) -> None:
    args = found["good"]["effective_args"]
    assert args["per_device_train_batch_size"] == 2
    assert args["logging_nan_inf_filter"] is False
    assert args["eval_strategy"] == "epoch"
    assert args["bf16"] is False
    assert args["adam_beta2"] == 0.999
    on_gpus = found["enough memory"]["effective_args"]
    assert on_gpus["use_cpu"] is False
    assert on_gpus["bf16"] is True


def test_samples_show_the_text_and_what_of_it_is_trained_on(found: dict[str, Any]) -> None:
    sample = found["marked"]["samples"][0]
    trained = "".join(part["text"] for part in sample["segments"] if part["trained"])
    given = "".join(part["text"] for part in sample["segments"] if not part["trained"])
    assert trained.endswith("<|im_end|>")
    assert " = " in trained
    assert "How much is" in given
    assert sample["trained_tokens"] == sum(sample["mask"]) < sample["tokens"] == len(sample["ids"])
    assert sample["text"] == "".join(part["text"] for part in sample["segments"])


def test_only_the_completion_is_trained_on_unless_one_says_otherwise(found: dict[str, Any]) -> None:
    sample = found["pairs"]["samples"][0]
    assert sample["mask"][0] == 0 and sample["mask"][-1] == 1
    assert all(found["all of pairs"]["samples"][0]["mask"])


def test_packed_sequences_are_counted_not_rows(found: dict[str, Any]) -> None:
    packed = found["packed"]
    assert packed["problems"] == []
    assert packed["estimates"]["steps per epoch"].startswith("about ")
    rows, tokens = 20, float(packed["estimates"]["tokens per row"].removeprefix("about "))
    assert int(packed["estimates"]["steps per epoch"].removeprefix("about ")) <= -(-rows * (tokens + 1) // (64 * 8))


def test_rows_whose_trained_part_is_cut_away_are_a_problem(found: dict[str, Any]) -> None:
    problem = the_problem(found, "truncated")
    assert problem.startswith("DatasetEmpty: ") and "max_length 16" in problem
    assert any("longer than max_length 16" in warning for warning in found["truncated"]["warnings"])


def test_bad_rows_are_counted_with_an_example(found: dict[str, Any]) -> None:
    problem = the_problem(found, "bad rows")
    assert (
        problem.startswith("DatasetRowsInvalid: spec.datasets: ")
        and "1 of 4 rows" in problem
        and "without content" in problem
    )


def test_a_missing_file_is_named_with_its_neighbour(found: dict[str, Any]) -> None:
    problem = the_problem(found, "missing file")
    assert problem.startswith("DatasetNotFound: spec.datasets[0]: ")
    assert "rosw.jsonl does not exist" in problem and "did you mean rows.jsonl?" in problem


def test_a_missing_column_is_named_with_those_there_are(found: dict[str, Any]) -> None:
    problem = the_problem(found, "missing column")
    assert problem.startswith("DatasetColumnMissing: spec.datasets[0].columns: ")
    assert "mesages" in problem and "did you mean messages?" in problem


def test_a_model_without_a_tokenizer_is_refused(found: dict[str, Any]) -> None:
    problem = the_problem(found, "no tokenizer")
    assert problem.startswith("TokenizerMissing: spec.model.source: ") and "no-tokenizer" in problem


def test_conversations_need_a_chat_template(found: dict[str, Any]) -> None:
    problem = the_problem(found, "no template")
    assert problem.startswith("ChatTemplateMissing: ") and "set spec.model.chatTemplate" in problem
    assert found["template given"]["problems"] == []
    assert found["text needs no template"]["problems"] == []


def test_pickled_weights_are_refused(found: dict[str, Any]) -> None:
    problem = the_problem(found, "pickled")
    assert problem.startswith("UnsafeWeights: ")
    assert "pytorch_model.bin" in problem and "safetensors" in problem


def test_a_missing_model_is_told_once(found: dict[str, Any]) -> None:
    assert the_problem(found, "no model").startswith("ModelNotFound: ")


def test_an_end_of_turn_that_is_no_token_is_named_with_its_neighbour(found: dict[str, Any]) -> None:
    problem = the_problem(found, "eos")
    assert problem.startswith("ConfigInvalid: spec.model.eosToken: ") and "did you mean <|im_end|>" in problem


def test_what_the_trainer_refuses_is_told_by_its_key(found: dict[str, Any]) -> None:
    assert the_problem(found, "refused by TRL").startswith("ConfigInvalid: spec.sft.args.warmup_steps: ")
    assert the_problem(found, "nothing to evaluate").startswith("ConfigInvalid: spec.sft.args.eval_strategy: ")
    assert "generation" in the_problem(found, "marks missing")


def test_own_code_that_imports_passes(found: dict[str, Any]) -> None:
    assert found["own code"]["problems"] == []


def test_own_code_that_does_not_import_shows_its_last_traceback_lines(found: dict[str, Any]) -> None:
    problem = the_problem(found, "broken callback")
    assert problem.startswith("CodeImportFailed: spec.callbacks[0].function: ")
    assert "JSONDecodeError" in problem and "broken_callbacks.py" in problem
    assert "owncode.py" not in problem and "importlib" not in problem
    assert "there is no module nowhere" in the_problem(found, "no such module")
    assert "has no Cuont; it defines Count" in the_problem(found, "no such name")
    assert "evry" in the_problem(found, "wrong params")
    assert "not a subclass of trl.SFTTrainer" in the_problem(found, "no trainer")


def test_a_batch_that_the_world_size_does_not_divide_is_refused(found: dict[str, Any]) -> None:
    problem = the_problem(found, "split")
    assert problem.startswith("BatchNotDivisible: spec.sft.args.per_device_train_batch_size 3 ")
    assert "2 ranks" in problem and "write 2 or 4" in problem


def test_packages_that_args_imply_and_the_image_lacks_are_named(found: dict[str, Any]) -> None:
    problems = found["packages"]["problems"]
    assert [problem.split(": ", 1)[0] for problem in problems] == ["PackageMissing", "PackageMissing"]
    assert "galore-torch" in problems[0] and "flash-attn" in problems[1]


def test_an_estimate_above_the_gpus_memory_is_told_in_its_parts(found: dict[str, Any]) -> None:
    problem = the_problem(found, "memory")
    assert problem.startswith("EstimateExceedsMemory: ") and "(H100) have 1.0 GiB" in problem
    assert "weights" in problem and "activations" in problem
    assert found["enough memory"]["problems"] == []
    assert found["enough memory"]["estimates"]["memory per GPU"].endswith("of 80.0 GiB")


def test_all_problems_come_at_once(found: dict[str, Any]) -> None:
    reasons = [problem.split(":", 1)[0] for problem in found["everything at once"]["problems"]]
    expected = {"PackageMissing", "CodeImportFailed", "ConfigInvalid", "TokenizerMissing"}
    assert set(reasons) == expected | {"DatasetNotFound", "DatasetColumnMissing"}


def test_without_prepare_nothing_is_checked(found: dict[str, Any]) -> None:
    disabled = found["disabled"]
    assert disabled["problems"] == [] and disabled["samples"] == []
    assert disabled["result"]["artifacts"]["model"].endswith("no-tokenizer")


def test_what_was_found_travels_as_json(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found["good"]["result"]))["artifacts"]["model"].startswith("file:///")


def test_the_container_leaves_a_result_facts_and_files(
    trainer_python: Path, tiny_model: Path, rows: Path, held_out: Path, tmp_path: Path
) -> None:
    config = build_config(model=tiny_model, rows=rows, held_out=held_out, attempt=0)
    pod = Pod(
        storage=tmp_path / "storage", folder=tmp_path / "pod", python=trainer_python, config=config, workload="prepare"
    )
    assert pod.run() == ExitCode.DONE, pod.log.read_text()
    result = pod.result()
    assert result.reason == "Prepared"
    assert result.artifacts == {"model": f"file://{tiny_model}"}
    [fact] = pod.bodies("PrepareResult")
    assert fact.problems == () and fact.estimates["steps"] == "6"
    assert json.loads((pod.storage / "effective_args.json").read_text())["max_length"] == 64
    records = read_records(pod.storage)
    assert len(records.samples) == 8
    assert records.samples[0].trained_tokens == records.samples[0].tokens > 0


def test_the_container_ends_with_every_problem_and_code_2(
    trainer_python: Path, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    config = build_config(
        model=tiny_model,
        rows=rows,
        attempt=0,
        args={"optim": "galore_adamw"},
        datasets=[{"source": f"file://{rows}", "columns": ["text"]}],
    )
    pod = Pod(
        storage=tmp_path / "storage", folder=tmp_path / "pod", python=trainer_python, config=config, workload="prepare"
    )
    assert pod.run() == ExitCode.INVALID
    result = pod.result()
    assert result.reason == "PackageMissing"
    assert "PackageMissing: " in result.message and "DatasetColumnMissing: " in result.message
    [fact] = pod.bodies("PrepareResult")
    assert len(fact.problems) == 2
    assert not (pod.storage / "samples.json").exists()
