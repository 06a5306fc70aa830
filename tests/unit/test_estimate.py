"""The memory estimate against sums done by hand, and the parameters of known models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain_workloads.estimate import (
    GIB,
    Adapter,
    Architecture,
    Setup,
    count_parameters,
    estimate,
    optimizer_bytes,
    read_architecture,
    to_gib,
)

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
QWEN_2_5_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SMOLLM_2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN_2_5_1_5B, 1_543_714_304),
        (QWEN_3_8B, 8_190_735_360),
        (MISTRAL_7B, 7_241_732_096),
        (SMOLLM_2_135M, 134_515_008),
    ],
    ids=["Llama-3-8B", "Qwen2.5-1.5B", "Qwen3-8B", "Mistral-7B", "SmolLM2-135M"],
)
def test_parameters_follow_from_the_shape(config: dict[str, Any], parameters: int) -> None:
    """The numbers are those that the models' authors give (safetensors metadata on their pages)."""
    architecture = read_architecture(config)
    assert architecture is not None
    assert architecture.parameters == parameters


def test_a_shape_that_is_not_known_is_not_guessed() -> None:
    assert read_architecture({"model_type": "gpt2", "n_embd": 768}) is None


def test_parameters_are_counted_in_safetensors_headers(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(34))
    assert count_parameters([file, file]) == 2 * (6 + 5)
    whole = file.read_bytes()
    for content, said in (
        (whole[:-1], "bytes, and should have"),
        (whole[:20], "is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "is no safetensors file"),
        (b"", "is no safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            count_parameters([file])


# A shape with round numbers: a layer has 4 * 100 * 100 + 3 * 100 * 300 + 200 = 130,200 parameters.
SMALL = Architecture(
    layers=2, hidden=100, intermediate=300, heads=10, kv_heads=10, head_dim=10, vocabulary=1000, tied=True
)
N = 100_000 + 2 * 130_200 + 100
BASE = Setup(
    architecture=SMALL,
    parameters=N,
    weight_bytes=4,
    mixed_precision=True,
    batch=2,
    length=50,
    attention="flash",
    world_size=4,
)


def states(setup: Setup) -> list[int]:
    parts = estimate(setup).parts
    return [parts[name] for name in ("weights", "gradients", "optimizer", "communication")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # fp32 weights and what autocast has cast; fp32 gradients; two fp32 moments; the buckets of gradients
        ({}, [6 * N, 4 * N, 8 * N, 4 * N]),
        ({"world_size": 1}, [6 * N, 4 * N, 8 * N, 0]),
        # everything bf16, and so are the moments
        ({"weight_bytes": 2}, [2 * N, 2 * N, 4 * N, 2 * N]),
        ({"optimizer": "adamw_bnb_8bit"}, [6 * N, 4 * N, 2 * N, 4 * N]),
        ({"optimizer": "paged_adamw_8bit"}, [6 * N, 4 * N, 0, 4 * N]),
        # the ZeRO paper's 2 + 2 + 12 / ranks, 2 + (2 + 12) / ranks, (2 + 2 + 12) / ranks
        ({"strategy": "ZeRO1"}, [2 * N, 2 * N, 3 * N, 4 * N]),
        ({"strategy": "ZeRO2"}, [2 * N, N // 2, 3 * N, 4 * N]),
        ({"strategy": "ZeRO3"}, [N // 2, N // 2, 3 * N, 2 * N]),
        ({"strategy": "ZeRO2", "offload": "Optimizer"}, [2 * N, 0, 0, 4 * N]),
        ({"strategy": "ZeRO3", "offload": "Full"}, [0, 0, 0, 2 * N]),
        # fp32 shards; two layers and the embedding whole in bf16
        ({"strategy": "FSDP"}, [N, N, 2 * N, 2 * (2 * 130_200 + 100_000)]),
        ({"strategy": "FSDP", "offload": "Full"}, [0, 0, 0, 2 * (2 * 130_200 + 100_000)]),
    ],
)
def test_states_are_the_sums_of_the_papers(changes: dict[str, Any], expected: list[int]) -> None:
    assert states(replace(BASE, **changes)) == expected


# Rank 8 on q, k, v, o (100 -> 100) and gate, up, down (100 <-> 300), in both layers.
LORA = 2 * 8 * (4 * 200 + 3 * 400)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # the base as loaded; the adapter fp32, with its bf16 casts
        ({"weight_bytes": 2}, [2 * N + 6 * LORA, 4 * LORA, 8 * LORA, 4 * LORA]),
        ({"weight_bytes": 2, "strategy": "ZeRO3"}, [(2 * N + 2 * LORA) // 4, LORA // 2, 3 * LORA, 2 * N]),
    ],
)
def test_an_adapter_leaves_the_base_without_gradients(changes: dict[str, Any], expected: list[int]) -> None:
    assert states(replace(BASE, adapter=Adapter(rank=8), **changes)) == expected


def test_an_adapter_on_some_modules_is_smaller() -> None:
    assert Adapter(rank=8, target_modules=("q_proj", "v_proj")).parameters(SMALL) == 2 * 8 * 2 * 200


def test_a_quantized_base_takes_four_bits_and_its_constants() -> None:
    linear = 2 * 130_000
    setup = replace(BASE, adapter=Adapter(rank=8, quantized=True))
    base = int(linear * 4.127 / 8) + 2 * (N - linear)
    assert states(setup) == [base + 2 * LORA, 2 * LORA, 4 * LORA, 2 * LORA]


TOKENS = 2 * 50
# Two norms of 8 bytes, q k v and the output of 2, four widths of the MLP of 2.
LAYER = TOKENS * (2 * 8 * 100 + 4 * 2 * 100 + 4 * 2 * 300)
ENDS = TOKENS * 100 * 2 * 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpointing": False}, 2 * LAYER + ENDS),
        ({}, 2 * TOKENS * 100 * 2 + LAYER + ENDS),
        ({"offload_activations": True}, LAYER + ENDS),
        ({"fused_norms": True}, 2 * TOKENS * 100 * 2 + LAYER - TOKENS * 2 * 4 * 100 + ENDS),
        # a mask of booleans, and one of numbers in the layer
        ({"attention": "sdpa"}, 2 * TOKENS * 100 * 2 + LAYER + ENDS + TOKENS * 50 * 3),
        ({"attention": "sdpa", "padding_free": True}, 2 * TOKENS * 100 * 2 + LAYER + ENDS + TOKENS * 100 * 3),
        # and the softmax of every head
        ({"attention": "eager"}, 2 * TOKENS * 100 * 2 + LAYER + TOKENS * 10 * 50 * 6 + ENDS + TOKENS * 50),
    ],
)
def test_activations_are_what_each_operator_keeps(changes: dict[str, Any], expected: int) -> None:
    assert estimate(replace(BASE, **changes)).parts["activations"] == expected


def test_logits_come_in_tiles_unless_all_are_needed_at_once() -> None:
    tiled = TOKENS * 32768 * 2 + TOKENS * 100 * 4
    assert estimate(BASE).parts["logits"] == tiled + 1000 * 100 * 4
    assert estimate(replace(BASE, adapter=Adapter(rank=8))).parts["logits"] == tiled
    assert estimate(replace(BASE, full_logits=True)).parts["logits"] == TOKENS * 1000 * 10
    long = estimate(replace(BASE, length=1_000_000)).parts["logits"]
    assert long == 4096 * 32768 * 2 + 2_000_000 * 100 * 4 + 1000 * 100 * 4


def test_an_engine_takes_its_share_all_the_time_or_while_it_generates() -> None:
    training = estimate(BASE).total
    assert estimate(replace(BASE, engine=GIB)).total == training + GIB
    assert estimate(replace(BASE, engine=1000, engine_sleeps=True)).parts == estimate(BASE).parts
    sleeping = estimate(replace(BASE, engine=40 * GIB, engine_sleeps=True))
    assert (sleeping.parts["gradients"], sleeping.parts["vLLM"]) == (0, 40 * GIB)
    assert "activations" not in sleeping.parts


def test_an_optimizer_that_is_not_known_counts_as_adam() -> None:
    assert optimizer_bytes("schedule_free_adamw", element=4) == 8
    assert optimizer_bytes("lion_32bit", element=2) == 4


def test_a_published_recipe_fits_the_gpus_it_was_written_for_and_fewer_do_not_do() -> None:
    """OpenR1-Distill-7B: ZeRO-3 on 8 H100s of 80 GB, batches of 2 with 32,768 tokens, liger."""
    shape = read_architecture({**QWEN_2_5_1_5B, **QWEN_7B})
    assert shape is not None
    recipe = Setup(
        architecture=shape,
        parameters=shape.parameters,
        weight_bytes=2,
        mixed_precision=True,
        batch=2,
        length=32768,
        strategy="ZeRO3",
        world_size=8,
        attention="flash",
        fused_norms=True,
    )
    assert 20 * GIB < estimate(recipe).total < 79 * GIB
    assert estimate(replace(recipe, checkpointing=False)).total > 79 * GIB
    assert estimate(replace(recipe, world_size=1)).total > 79 * GIB


QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def test_sizes_are_written_in_gib() -> None:
    assert to_gib(3 * GIB + GIB // 10) == "3.1 GiB"
