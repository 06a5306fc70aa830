"""How much memory one GPU needs for a step of training: arithmetic on the model's shape.

It owns the formulas; it must not import torch, look at a GPU or decide whether the sum is too much.

Sources: ZeRO, arXiv:1910.02054, section 3.1 and figure 1 (2 bytes of weights, 2 of gradients and 12 of optimizer for
each parameter in mixed precision with Adam, and what each stage divides by the number of ranks); ZeRO-Offload,
arXiv:2101.06840; activations after Korthikanti et al., arXiv:2205.05198, section 4 (what each operator keeps for the
backward pass, 2sbh a layer when all is recomputed), written out here for layers with RMSNorm, grouped queries and a
gated MLP, which their equation 1 does not cover; QLoRA, arXiv:2305.14314, section 3 (4 bits a weight and 0.127 for the
quantization constants); the head after TRL 1.16, trl/kernels/chunked_logprob.py, which never builds all logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GIB = 2**30

Strategy = Literal["DDP", "ZeRO1", "ZeRO2", "ZeRO3", "FSDP"]
Offload = Literal["None", "Optimizer", "Full"]
Attention = Literal["eager", "sdpa", "flash"]

_WORKSPACE = 1 * GIB
"""CUDA context, cuBLAS and NCCL buffers."""
_MASTER = 4
"""DeepSpeed's own fp32 copy of what it optimizes (K = 12 in the ZeRO paper: this and Adam's two moments)."""
_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size and allgather_bucket_size, in elements."""
_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default stage3_max_live_parameters."""
_HEAD_TOKENS, _HEAD_VOCABULARY = 4096, 32768
"""One tile of logits in TRL's fused head."""
_QUANTIZED = (4 + 0.127) / 8


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a decoder whose layers have RMSNorm, attention and a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; with experts: of all that see one token."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the embedding and, where it has its own, of the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules, by name."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        biases = self.qkv_bias * (self.query + 2 * self.key) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + biases + norms

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.embedding + self.layers * self.layer + self.hidden


def read_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return the shape that a config.json describes, or None where it is not of this kind."""
    text = config.get("text_config", config)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(not isinstance(text.get(key), int) for key in needed):
        return None
    heads = text["num_attention_heads"]
    model_type = text.get("model_type", "")
    experts = text.get("num_experts_per_tok")
    return Architecture(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        intermediate=text.get("moe_intermediate_size", text["intermediate_size"]) * experts
        if experts
        else text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        # transformers writes only what differs from a model's default, and these tie by default.
        tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings", model_type.startswith("gemma"))),
        qkv_bias=model_type in ("qwen2", "qwen2_moe") or bool(text.get("attention_bias")),
        output_bias=bool(text.get("attention_bias")),
        mlp_bias=bool(text.get("mlp_bias")),
        qk_norm=model_type.startswith("qwen3"),
    )


def count_parameters(files: Iterable[Path]) -> int:
    """Return the parameters in safetensors files, from their headers alone.

    Format: 8 bytes little endian, the length of a JSON object of `{name: {dtype, shape, data_offsets}}`, and the data.

    Raises:
        ValueError: a file is not of this format, or not as long as its header says.
    """
    total = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= size else None
        if not isinstance(header, dict):
            raise ValueError(f"{path.name} is no safetensors file")
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        if size != expected:
            raise ValueError(f"{path.name} has {size:,} bytes, and should have {expected:,}")
        total += sum(math.prod(entry["shape"]) for entry in tensors)
    return total


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA, on a base in 4 bits where `quantized`."""

    rank: int
    target_modules: tuple[str, ...] | None = None
    quantized: bool = False

    def parameters(self, architecture: Architecture) -> int:
        """Return the adapter's parameters: rank times inputs and outputs of each module that it is on."""
        return architecture.layers * sum(
            self.rank * (inputs + outputs)
            for name, (inputs, outputs) in architecture.linears.items()
            if self.target_modules is None or name in self.target_modules
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that the memory of a step depends on."""

    architecture: Architecture
    parameters: int
    weight_bytes: Literal[2, 4]
    """Size of an element as the weights are loaded."""
    mixed_precision: bool
    batch: int
    """Rows of one rank's micro-batch."""
    length: int
    """Tokens of its longest row, with its padding."""
    optimizer: str = "adamw_torch_fused"
    strategy: Strategy = "DDP"
    offload: Offload = "None"
    world_size: int = 1
    adapter: Adapter | None = None
    checkpointing: bool = True
    offload_activations: bool = False
    attention: Attention = "sdpa"
    padding_free: bool = False
    full_logits: bool = False
    """Label smoothing and the like take all logits at once."""
    fused_norms: bool = False
    """Liger's kernels keep no fp32 copies in their norms."""
    reference: bool = False
    """A second model is there, of which only the log-probabilities are taken."""
    rollout: int = 0
    """Completions that one rank generates at a time, with a cache of keys and values of its own model."""
    engine: int = 0
    """Bytes that vLLM takes for itself, weights and cache; 0 without it."""
    engine_sleeps: bool = False
    """It has them while it generates, and gives them back for the rest of the step."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def estimate(setup: Setup) -> Estimate:
    """Return the memory of the fullest moment of a step on one GPU."""
    match setup.strategy:
        case "DDP":
            states = _replicated(setup)
        case "FSDP":
            states = _fsdp(setup)
        case _:
            states = _deepspeed(setup)
    if setup.reference:
        sharded = setup.strategy in ("ZeRO3", "FSDP")
        states["reference"] = setup.parameters * setup.weight_bytes // (setup.world_size if sharded else 1)
    passes = {"activations": _activations(setup), "logits": _logits(setup)}
    name, rollout = ("vLLM", setup.engine) if setup.engine else ("rollout", _cache(setup))
    if setup.engine and not setup.engine_sleeps:
        states["vLLM"], rollout = setup.engine, 0
    if rollout > states["gradients"] + sum(passes.values()):  # a rollout comes before there are any of those
        return Estimate({**states, "gradients": 0, name: rollout, "workspace": _WORKSPACE})
    return Estimate({**states, **passes, "workspace": _WORKSPACE})


def optimizer_bytes(name: str, *, element: int) -> int:
    """Return the bytes of optimizer state for each parameter on the GPU; `element`: bytes of the parameter itself.

    torch keeps states in the parameter's type, bitsandbytes in fp32 or 8 bits; paged ones leave the GPU when it is
    full. An optimizer that is not known here counts as Adam.
    """
    if name.startswith("paged_"):
        return 0
    match name:
        case "sgd" | "adafactor" | "lomo" | "adalomo":
            return 0  # adafactor keeps a row and a column of each matrix: nothing beside its size
        case "adamw_torch_8bit" | "adamw_bnb_8bit" | "adamw_8bit":
            return 2
        case "adamw_torch_4bit" | "lion_8bit" | "rmsprop_bnb_8bit":
            return 1
        case "ademamix_8bit":
            return 3
        case "lion_32bit" | "rmsprop_bnb" | "rmsprop_bnb_32bit":
            return 4
        case "ademamix":
            return 12
        case "adagrad" | "rmsprop":
            return element
    return 2 * element


def _trained(setup: Setup) -> int:
    return setup.adapter.parameters(setup.architecture) if setup.adapter else setup.parameters


def _base(setup: Setup, *, element: int) -> int:
    """Bytes of the weights that an adapter leaves as they are; 0 without one."""
    if setup.adapter is None:
        return 0
    if not setup.adapter.quantized:
        return setup.parameters * element
    shape = setup.architecture
    linear = min(shape.layers * sum(i * o for i, o in shape.linears.values()), setup.parameters)
    return int(linear * _QUANTIZED) + (setup.parameters - linear) * 2


def _replicated(setup: Setup) -> dict[str, int]:
    """Plain data parallelism: everything on every rank, and a second copy of the gradients to send them from."""
    trained = _trained(setup)
    element: int = setup.weight_bytes
    if setup.adapter:
        element = 2 if setup.adapter.quantized else 4  # PEFT makes an adapter fp32, TRL a quantized base's bf16
    casts = 2 * trained if setup.mixed_precision and element == 4 else 0  # autocast keeps what it has cast
    return {
        "weights": _base(setup, element=setup.weight_bytes) + trained * element + casts,
        "gradients": trained * element,
        "optimizer": trained * optimizer_bytes(setup.optimizer, element=element),
        "communication": trained * element if setup.world_size > 1 else 0,
    }


def _deepspeed(setup: Setup) -> dict[str, int]:
    """ZeRO-1 shards the optimizer, ZeRO-2 the gradients too, ZeRO-3 the weights too."""
    ranks = setup.world_size
    trained = _trained(setup)
    element = 2 if setup.mixed_precision else 4
    base = _base(setup, element=element)
    stage = int(setup.strategy.removeprefix("ZeRO"))
    weights = base + trained * element
    gradients = trained * element
    states = trained * (_MASTER + optimizer_bytes(setup.optimizer, element=4)) // ranks
    largest = max(setup.architecture.layer, setup.architecture.vocabulary * setup.architecture.hidden)
    if stage == 3:
        weights //= ranks
        live = max(min(_LIVE_PARAMETERS, setup.parameters), largest)
        communication = live * element
    else:
        communication = 2 * min(_BUCKET, trained) * element
    if stage >= 2:
        gradients //= ranks
    if setup.offload != "None":
        states = 0
        gradients = 0 if stage >= 2 else gradients
    if setup.offload == "Full":
        weights = 0
    return {"weights": weights, "gradients": gradients, "optimizer": states, "communication": communication}


def _fsdp(setup: Setup) -> dict[str, int]:
    """FSDP2 as accelerate sets it up: all is sharded, and what is trained is fp32 under mixed precision."""
    ranks, shape = setup.world_size, setup.architecture
    trained = _trained(setup)
    element = 4 if setup.mixed_precision else setup.weight_bytes
    compute = 2 if setup.mixed_precision else setup.weight_bytes
    # Two layers are whole at a time (one computes, one is fetched); what is outside the layers stays whole.
    whole = (2 * shape.layer + shape.embedding) * compute
    if setup.offload == "Full":
        return {"weights": 0, "gradients": 0, "optimizer": 0, "communication": whole}
    return {
        "weights": (_base(setup, element=setup.weight_bytes) + trained * element) // ranks,
        "gradients": trained * element // ranks,
        "optimizer": trained * optimizer_bytes(setup.optimizer, element=element) // ranks,
        "communication": whole,
    }


def _element(setup: Setup) -> int:
    """Bytes of an element of the activations."""
    return 2 if setup.mixed_precision or setup.weight_bytes == 2 else 4


def _activations(setup: Setup) -> int:
    """What the forward pass keeps for the backward pass.

    A layer keeps for each token: of each norm its input and normed input (in fp32 where it computes so) and its output;
    the queries, the keys, the values and what attention gives; of the MLP four times its width.
    """
    shape, element = setup.architecture, _element(setup)
    tokens = setup.batch * setup.length
    norm = (2 * element if setup.fused_norms else 4 + 2 * element if element == 2 else 3 * element) * shape.hidden
    row = tokens if setup.padding_free else setup.length
    mask = tokens * row  # of booleans
    match setup.attention:
        case "flash":
            attention = element * (2 * shape.query + 2 * shape.key)
            mask = 0
        case "sdpa":
            # With a mask, each layer makes numbers of it, and repeats keys and values for every head: those of a single
            # head need no copies for that.
            repeated = shape.query if shape.kv_heads > 1 else shape.key
            attention = element * (2 * shape.query + 2 * repeated + row)
        case "eager":  # the softmax, in fp32 and as it is used
            attention = element * 4 * shape.query + shape.heads * row * (4 if element == 4 else 6)
    layer = tokens * (2 * norm + attention + element * 4 * shape.intermediate)
    ends = tokens * shape.hidden * element * 3
    if not setup.checkpointing:
        return shape.layers * layer + mask + ends
    kept = 0 if setup.offload_activations else shape.layers * tokens * shape.hidden * element
    return kept + layer + mask + ends


def _logits(setup: Setup) -> int:
    """The head: TRL computes it in tiles and sums the gradients in fp32; or all logits, their fp32 copy and softmax."""
    shape, element = setup.architecture, _element(setup)
    tokens = setup.batch * setup.length
    if setup.full_logits:
        return tokens * shape.vocabulary * (element + 4 + 4)
    tile = min(tokens, _HEAD_TOKENS) * _HEAD_VOCABULARY * element
    head = 0 if setup.adapter else shape.vocabulary * shape.hidden * 4
    return tile + tokens * shape.hidden * 4 + head


def _cache(setup: Setup) -> int:
    """The keys and values of all that a rank generates at a time."""
    return setup.rollout * setup.length * setup.architecture.layers * 2 * setup.architecture.key * _element(setup)


def to_gib(size: int) -> str:
    """Return bytes as a person reads them: `3.1 GiB`."""
    return f"{size / GIB:.1f} GiB"
