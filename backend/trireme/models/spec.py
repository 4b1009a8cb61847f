"""Spec: what a checkpoint is, read from its config.json. No torch; tensors' names are in the family's file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trireme.core.refusal import Refusal

Family = Literal["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"]
HYBRID: tuple[Family, ...] = ("qwen3_5", "qwen3_5_moe", "qwen3_next")  # with gated delta layers
_MIXTURES: tuple[Family, ...] = ("qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next")

_HYBRID_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_HYBRID_MIXTURE_DEFAULTS: Mapping[str, Any] = {
    **_HYBRID_DEFAULTS,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}
_QWEN3_5: tuple[Family, Mapping[str, Any]] = ("qwen3_5", {**_HYBRID_DEFAULTS, "num_key_value_heads": 4})
_QWEN3_5_MOE: tuple[Family, Mapping[str, Any]] = (
    "qwen3_5_moe",
    {**_HYBRID_MIXTURE_DEFAULTS, "num_experts": 256, "num_experts_per_tok": 8},
)

# What transformers assumes where a config is silent, and what a family fixes in code.
_FAMILIES: Mapping[str, tuple[Family, Mapping[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {"max_position_embeddings": 2048}),
    "Qwen2ForCausalLM": ("qwen2", {"max_position_embeddings": 32768, "attention_bias": True, "num_key_value_heads": 32}),
    "Qwen3ForCausalLM": ("qwen3", {"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32}),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        {
            "max_position_embeddings": 32768,
            "qkv_bias": True,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_local_experts": 128,  # transformers 5's spelling; num_experts where a config has that
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_MOE,
    "Qwen3NextForCausalLM": (
        "qwen3_next",
        # published configs say nothing of the head that their weights have
        {**_HYBRID_MIXTURE_DEFAULTS, "num_experts": 512, "num_experts_per_tok": 10, "mtp_num_hidden_layers": 1},
    ),
}
ARCHITECTURES = tuple(_FAMILIES)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. `kind` says which of the other numbers count: linear (factor), llama3 (factor, low, high, original
    length), yarn (factor, beta_fast, beta_slow, truncate, attention_factor, original length)."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0  # tokens of the pretrained context
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # cos and sin are multiplied by it


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Sizes of the gated delta layers. Each value head has a state; neighbouring ones share a key head."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # rows that the causal convolution sees, its own included

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One checkpoint. Sizes are whole: no rank's share."""

    family: Family
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int  # of dense MLPs
    vocab_size: int
    eps: float
    rope: Rope
    windows: tuple[int, ...]  # [num_layers]: a query sees so many last keys; 0 for all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: Literal["float32", "bfloat16", "float16"]  # of the checkpoint
    sparse: tuple[bool, ...]  # [num_layers]: whether a layer's MLP is a mixture of experts
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate: int = 0  # of one expert
    shared_intermediate: int = 0  # of the expert that every token passes; 0: there is none
    norm_topk_prob: bool = False  # whether the weights of a token's experts are made to sum to one
    eos_token_ids: tuple[int, ...] = ()
    delta: Delta | None = None  # of the layers that are `linear`
    linear: tuple[bool, ...] = ()  # [num_layers] where there is any: whether a layer has a gated delta rule in place of attention
    rotary_dim: int = 0  # the first so many numbers of a head turn; 0: all
    gated_attention: bool = False  # whether a head's result is weighed by the sigmoid of a gate of its own
    zero_centred: bool = False  # whether norms multiply by 1 + weight
    num_mtp_layers: int = 0  # of the head that drafts (mtp.*)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def read_spec(model: str | Path) -> Spec:
    """The Spec of a checkpoint directory, or of a config.json alone. Refusal where there is none, or where it asks for what no
    family here computes."""
    path = Path(model) if Path(model).is_file() else Path(model) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refusal(f"no checkpoint at {model}", why="it has no config.json", fix="set model to a checkpoint directory") from None
    except json.JSONDecodeError as error:
        raise Refusal(f"{path} is not JSON", why=str(error), fix="fetch the checkpoint again") from None
    spec = make_spec(values, source=str(path))
    return replace(spec, num_mtp_layers=0) if spec.num_mtp_layers and _lacks(path.parent, "mtp.") else spec


def _lacks(model_dir: Path, prefix: str) -> bool:
    """Whether there are weights, but none of such a name: what transformers saves keeps the config's word for the head that
    drafts, but not the head. Broken files are the loader's to refuse."""
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    try:
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
        else:
            with single.open("rb") as file:
                names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError, KeyError):
        return False
    return not any(name.startswith(prefix) for name in names)


def make_spec(values: Mapping[str, Any], *, source: str = "config.json") -> Spec:
    """The Spec of a config's values, in transformers' spelling of version 4 or 5."""
    architecture = (values.get("architectures") or [None])[0]
    if architecture is None or architecture not in _FAMILIES:
        raise Refusal(
            f"{source}: architecture {architecture!r} is not known",
            why=f"the families here are {', '.join(_FAMILIES)}",
            fix="serve one of them, or add a family (README, recipes)",
        )
    family, defaults = _FAMILIES[architecture]
    text = values.get("text_config") or {}  # of a model that also sees; what stands beside it is of the whole model
    config = _Config({**defaults, **_given(text), **{key: value for key, value in _given(values).items() if key != "text_config"}}, source)

    config.must_be("hidden_act", "silu", "MLPs here are gated by silu")
    config.must_be("attn_output_gate", True, "attention in Qwen3.5 and Qwen3-Next has a gate", only=family in HYBRID)
    config.must_be("norm_topk_prob", True, "Qwen3.5 makes the weights of a token's experts sum to one", only=family == "qwen3_5_moe")
    config.must_be("quantization_config", None, "weights here are float32, bfloat16 or float16")
    config.must_be("attention_bias", True, "Qwen2 checkpoints have query, key and value biases", only=family == "qwen2")
    dtype = config.get("dtype", config.get("torch_dtype", "float32"))
    if dtype not in ITEM_BYTES:
        raise config.refusal(f"dtype {dtype!r} is not known", f"it is one of {', '.join(ITEM_BYTES)}")

    hidden, num_layers, num_heads = config.size("hidden_size"), config.size("num_hidden_layers"), config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.refusal(f"{num_kv_heads} key/value heads do not divide {num_heads} heads", "each serves equally many query heads")
    head_dim = config.size("head_dim", hidden // num_heads)
    if head_dim % 2:
        raise config.refusal(f"head_dim {head_dim} is odd", "rotary positions turn pairs")
    experts = _read_experts(config, family, num_layers)

    biased = bool(config.get("qkv_bias" if family == "qwen2_moe" else "attention_bias", False))
    max_position = config.size("max_position_embeddings")
    eos = config.get("eos_token_id", [])
    return Spec(
        family=family,
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate=config.size("intermediate_size") if not all(experts["sparse"]) else config.get("intermediate_size", 0),
        vocab_size=config.size("vocab_size"),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config, max_position),
        windows=_read_windows(config, family, num_layers),
        qkv_bias=biased,
        o_bias=biased and family not in ("qwen2", "qwen2_moe"),
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe", *HYBRID),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=max_position,
        dtype=dtype,
        **experts,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        rotary_dim=_read_rotary_dim(config, head_dim, family),
        **(_read_hybrid(config, num_layers) if family in HYBRID else {}),
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


class _Config:
    """A config's values with refusals that name the file."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self._values, self._source = values, source

    def get(self, key: str, default: Any) -> Any:
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.refusal(f"{key} is {value!r}", "it must be a whole number above zero")
        return value

    def must_be(self, key: str, wanted: Any, why: str, *, only: bool = True) -> None:
        value = self._values.get(key, wanted)
        if only and value != wanted:
            raise self.refusal(f"{key} {value if isinstance(value, str | float | bool) else '(set)'} is not supported", why)

    def refusal(self, what: str, why: str) -> Refusal:
        return Refusal(f"{self._source}: {what}", why=why, fix="serve another checkpoint, or correct the file")


def _read_windows(config: _Config, family: Family, num_layers: int) -> tuple[int, ...]:
    """Where no layer_types says it, each family has its own rule of which layers slide."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else 0
    first = config.get("max_window_layers", 28)
    if family == "llama" or family in HYBRID:
        return (0,) * num_layers
    if family == "qwen3_moe":
        return (window,) * num_layers
    kinds = config.get("layer_types", None)
    if kinds is None:
        slides = [i % 2 == 0 and i < first if family == "qwen2_moe" else i >= first for i in range(num_layers)]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise config.refusal(f"layer_types {kinds!r}", f"it names full_attention or sliding_attention for each of {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _read_experts(config: _Config, family: Family, num_layers: int) -> dict[str, Any]:
    """The Spec's fields of a mixture of experts."""
    if family not in _MIXTURES:
        return {"sparse": (False,) * num_layers}
    num_experts = config.size("num_experts" if config.get("num_experts", None) is not None else "num_local_experts")
    num_experts_per_tok = config.size("num_experts_per_tok")
    if num_experts_per_tok > num_experts:
        raise config.refusal(
            f"num_experts_per_tok is {num_experts_per_tok} of {num_experts} experts", "a token's experts are different ones"
        )
    step, dense = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return {
        "sparse": tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate": config.size("moe_intermediate_size"),
        "shared_intermediate": config.get("shared_expert_intermediate_size", 0),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def _read_hybrid(config: _Config, num_layers: int) -> dict[str, Any]:
    """The Spec's fields of a model whose layers are gated delta rules, and now and then attention."""
    interval = config.size("full_attention_interval")
    plain = ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(num_layers)]
    kinds = config.get("layer_types", plain)
    if len(kinds) != num_layers or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise config.refusal(f"layer_types {kinds!r}", f"it names full_attention or linear_attention for each of {num_layers} layers")
    delta = Delta(
        num_key_heads=config.size("linear_num_key_heads"),
        num_value_heads=config.size("linear_num_value_heads"),
        key_dim=config.size("linear_key_head_dim"),
        value_dim=config.size("linear_value_head_dim"),
        kernel=config.size("linear_conv_kernel_dim"),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise config.refusal(
            f"{delta.num_key_heads} key heads do not divide {delta.num_value_heads} value heads", "each serves equally many value heads"
        )
    if delta.kernel < 2:
        raise config.refusal("linear_conv_kernel_dim is 1", "a convolution here sees rows before its own")
    drafts = config.get("mtp_num_hidden_layers", 0) if not config.get("mtp_use_dedicated_embeddings", False) else 0
    return {
        "delta": delta,
        "linear": tuple(kind == "linear_attention" for kind in kinds),
        "gated_attention": True,
        "zero_centred": True,
        "num_mtp_layers": drafts,
    }


def _read_rotary_dim(config: _Config, head_dim: int, family: Family) -> int:
    """How many numbers of a head turn; 0 where all do."""
    given = config.get("rope_scaling", None) or config.get("rope_parameters", None) or {}
    factor = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if factor != 1.0 and family not in HYBRID:
        raise config.refusal("partial_rotary_factor is set", "rotary positions in this family turn whole heads")
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.refusal(f"partial_rotary_factor {factor} turns {rotary_dim} of {head_dim} numbers", "rotary positions turn pairs")
    return rotary_dim if rotary_dim < head_dim else 0


def _read_rope(config: _Config, max_position: int) -> Rope:
    """Version 5 has `rope_parameters` with the base inside; version 4 `rope_scaling` with `rope_theta` beside it."""
    given = config.get("rope_scaling", None) or config.get("rope_parameters", None) or {}
    values = {key: value for key, value in given.items() if value is not None}
    theta = float(values.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic only departs from default beyond max_position_embeddings, which no sequence passes here
        return Rope(theta=theta)
    original = config.get("original_max_position_embeddings", values.get("original_max_position_embeddings", max_position))
    try:
        if kind == "linear":
            return Rope(theta=theta, kind="linear", factor=float(values["factor"]))
        if kind == "llama3":
            return Rope(
                theta=theta,
                kind="llama3",
                factor=float(values["factor"]),
                original_max_position=original,
                low_freq_factor=float(values["low_freq_factor"]),
                high_freq_factor=float(values["high_freq_factor"]),
            )
        if kind == "yarn":
            factor = float(values.get("factor", max_position / original))
            return Rope(
                theta=theta,
                kind="yarn",
                factor=factor,
                original_max_position=original,
                beta_fast=float(values.get("beta_fast", 32.0)),
                beta_slow=float(values.get("beta_slow", 1.0)),
                truncate=bool(values.get("truncate", True)),
                attention_factor=_yarn_attention_factor(factor, values),
            )
    except KeyError as error:
        raise config.refusal(f"{kind} rope scaling lacks {error}", "the scaling is not defined without it") from None
    raise config.refusal(f"rope scaling {kind!r} is not known", "known are default, linear, dynamic, llama3 and yarn")


def _yarn_attention_factor(factor: float, values: Mapping[str, Any]) -> float:
    """Peng et al. 2023, 3.4; DeepSeek's two mscales divide each other."""
    if "attention_factor" in values:
        return float(values["attention_factor"])

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(values["mscale"]) / scale(values["mscale_all_dim"])
    return scale(1.0)
