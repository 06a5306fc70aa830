"""Models and tokenizers as a spec asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads._prepare_configs import build_case_config, run_cases
from tests.workloads.test_prepare import MARKED, copy_model

pytestmark = pytest.mark.workloads

ATTENTIONS = ("sdpa", "eager")
KEY_HEADS = (1, 2)
"""Each for two heads of the queries."""


@pytest.fixture(scope="module")
def found(trainer_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    halves = copy_model(tiny_model, folder / "no-shard", without=("model.safetensors",))
    (halves / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')

    def case(name: str, *, path: Path = tiny_model, **more: Any) -> dict[str, Any]:
        config = build_case_config(model=f"file://{path}", datasets=[{"source": "file:///nowhere.jsonl"}], **more)
        return {"name": name, "what": "model", "config": config}

    scaling = {"rope_type": "linear", "factor": 4.0}
    cases = [
        case("plain"),
        case("bfloat16", model_fields={"dtype": "bfloat16", "attnImplementation": "eager"}),
        case("template", model_fields={"chatTemplate": MARKED, "eosToken": "<|endoftext|>"}),
        case("rope", model_fields={"config": {"rope_theta": 300000.0, "max_position_embeddings": 4096}}),
        case("rope scaling", model_fields={"config": {"rope_scaling": scaling}}),
        case("unknown override", model_fields={"config": {"max_position_embedings": 4096}}),
        case("lora", peft={"rank": 8, "alpha": 16, "dropout": "0.1", "targetModules": ["q_proj"]}),
        case("lora on all", peft={}),
        case("shard missing", path=halves),
        *(
            {
                **case(
                    f"activations of {attention}, {heads} for keys",
                    # The weights have the same shapes with any of them.
                    model_fields={
                        "attnImplementation": attention,
                        "config": {
                            "num_attention_heads": 2 * heads,
                            "num_key_value_heads": heads,
                            "head_dim": 32 // heads,
                        },
                    },
                ),
                "what": "activations",
            }
            for attention in ATTENTIONS
            for heads in KEY_HEADS
        ),
    ]
    return run_cases(cases, python=trainer_python, folder=folder / "run")


def test_on_a_cpu_weights_are_float32_and_nothing_is_cached(found: dict[str, Any]) -> None:
    assert found["plain"]["problems"] == []
    assert found["plain"]["dtype"] == "torch.float32"
    assert found["plain"]["config"]["use_cache"] is False


def test_dtype_and_attention_are_as_asked_for(found: dict[str, Any]) -> None:
    assert found["bfloat16"]["dtype"] == "torch.bfloat16"
    assert found["bfloat16"]["attention"] == "eager"


def test_template_and_end_of_turn_replace_the_tokenizers_own(found: dict[str, Any]) -> None:
    assert found["template"]["chat_template"] == MARKED
    assert found["template"]["eos_token"] == "<|endoftext|>"
    assert found["plain"]["eos_token"] == "<|im_end|>"


def test_overrides_of_rope_reach_the_model(found: dict[str, Any]) -> None:
    """transformers 5 passes over a rope_theta beside rope_parameters."""
    config = found["rope"]["config"]
    assert config["rope_parameters"]["rope_theta"] == 300000.0
    assert config["max_position_embeddings"] == 4096
    scaled = found["rope scaling"]["config"]["rope_parameters"]
    assert (scaled["rope_type"], scaled["factor"]) == ("linear", 4.0)
    assert scaled["rope_theta"] == found["plain"]["config"]["rope_parameters"]["rope_theta"]


def test_an_override_that_is_no_key_is_named_with_its_neighbour(found: dict[str, Any]) -> None:
    [problem] = found["unknown override"]["problems"]
    assert problem.startswith("ConfigInvalid: spec.model.config: max_position_embedings ")
    assert "did you mean max_position_embeddings?" in problem


def test_an_adapter_is_built_as_asked_for(found: dict[str, Any]) -> None:
    assert found["lora"]["adapter"] == [8, 16, 0.1, "{'q_proj'}"]
    assert found["lora on all"]["adapter"] == [16, 32, 0.05, "all-linear"]
    assert found["plain"]["adapter"] is None


def test_a_missing_shard_is_told_before_loading(found: dict[str, Any]) -> None:
    [problem] = found["shard missing"]["problems"]
    assert problem.startswith("ModelNotFound: ")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("heads", KEY_HEADS)
def test_the_estimate_of_activations_is_what_autograd_keeps(found: dict[str, Any], attention: str, heads: int) -> None:
    measured = found[f"activations of {attention}, {heads} for keys"]
    assert measured["estimated"] == pytest.approx(measured["kept"], rel=0.05)
    assert measured["parameters_of_shape"] == measured["parameters"]
