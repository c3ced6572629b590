"""Reads a Hugging Face `config.json` into a ModelArchitecture, for every family an RL job is likely to name.

Most families are one shape with different key names; `_QUIRKS` holds what the keys do not say (norms of queries and
keys, biases, extra norms), each taken from the family's modelling file in transformers 5.x. A family that is not in
the table is read by its keys alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture, VisionTower, model_from_layers
from miles_plan.catalog.ffns import DenseFfn, Ffn, MoeFfn
from miles_plan.catalog.mixers import CompressedLatent, GatedDelta, GroupedQuery, Indexer, Mamba2, Mixer, MultiLatent

Config = Mapping[str, Any]
T = TypeVar("T")
_ABSURD_SIZE = 1 << 31
_MOST_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quirk:
    """What a family's keys do not say."""

    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    output_gate: bool = False
    sinks: bool = False
    norm_vectors: int = 2
    gated: bool = True
    expert_bias: bool = False
    shared_gate: bool = False
    router_bias: bool = False
    norm_bias: bool = False
    gelu: bool = False


_QWEN3_5 = _Quirk(qk_norm="head", output_gate=True, shared_gate=True)
_GLM_4 = _Quirk(norm_vectors=4)
_QUIRKS: dict[str, _Quirk] = {
    "qwen2": _Quirk(qkv_bias=True),
    "qwen2_moe": _Quirk(qkv_bias=True, shared_gate=True),
    "qwen2_vl": _Quirk(qkv_bias=True),
    "qwen2_5_vl": _Quirk(qkv_bias=True),
    "mimo": _Quirk(qkv_bias=True),
    "qwen3": _Quirk(qk_norm="head"),
    "qwen3_moe": _Quirk(qk_norm="head"),
    "qwen3_vl": _Quirk(qk_norm="head"),
    "qwen3_vl_moe": _Quirk(qk_norm="head"),
    "qwen3_next": _QWEN3_5,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "glm": _Quirk(qkv_bias=True),
    "glm4": _GLM_4,
    "glm4_moe": _Quirk(router_bias=True),
    "glm4_moe_lite": _Quirk(router_bias=True),
    "glm_moe_dsa": _Quirk(router_bias=True),
    "deepseek_v3": _Quirk(router_bias=True),
    "deepseek_v32": _Quirk(router_bias=True),
    "deepseek_v4": _Quirk(router_bias=True),
    "kimi_k2": _Quirk(router_bias=True),
    "gpt_oss": _Quirk(qkv_bias=True, output_bias=True, sinks=True, expert_bias=True, router_bias=True),
    "minimax_m2": _Quirk(qk_norm="full", router_bias=True),
    "gemma": _Quirk(gelu=True),
    "gemma2": _Quirk(norm_vectors=4, gelu=True),
    "gemma3": _Quirk(qk_norm="head", norm_vectors=4, gelu=True),
    "gemma3_text": _Quirk(qk_norm="head", norm_vectors=4, gelu=True),
    "gemma4": _Quirk(qk_norm="head", norm_vectors=4, gelu=True),
    "nemotron_h": _Quirk(gated=False, router_bias=True),
    "nemotron": _Quirk(gated=False, norm_bias=True),
    "mpt": _Quirk(gated=False),
    "gpt2": _Quirk(gated=False, qkv_bias=True, output_bias=True, norm_bias=True),
    "inkling": _Quirk(qk_norm="head"),
}


def architecture_from_hf_config(config: Config, name: str, source: str = "config.json") -> ModelArchitecture:
    """Read a parsed `config.json`.

    Args:
        config: the parsed file; a multimodal one nests its language model under `text_config`.
        name: what the model is to be called.
        source: where the file came from, kept with the numbers.

    Raises:
        ValueError: a size that the family needs is missing, not a whole number, negative or absurd; the key is named.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config of {name}: must be a mapping, got {type(config).__name__}")
    keys = _text_keys(config, name)
    text = keys.config
    family = _family(text, config)
    quirk = _QUIRKS.get(family, _Quirk(qkv_bias=bool(text.get("attention_bias"))))
    hidden = keys.size("hidden_size", "n_embd", "d_model")
    layers = _layers(keys, quirk, family, hidden)
    return model_from_layers(
        layers,
        name=name,
        source=source,
        hidden_size=hidden,
        vocab_size=keys.size("vocab_size"),
        tie_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        learned_positions=keys.size("max_position_embeddings", "n_positions") if family == "gpt2" else 0,
        mtp_layers=keys.count("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", default=0),
        extra_params=_stream_head_params(layers, hidden),
        vision=_vision(_Keys(config, name).mapping("vision_config"), keys),
        logit_softcap=bool(text.get("final_logit_softcapping", family == "gemma2")),
    )


def _text_keys(config: Config, name: str) -> _Keys:
    """The language model's part of a configuration."""
    whole = _Keys(config, name)
    parts = (whole.mapping(each) for each in ("text_config", "language_config", "llm_config"))
    return _Keys(next((part for part in parts if part), config), name)


def _family(text: Config, config: Config) -> str:
    family = str(text.get("model_type") or config.get("model_type") or "").removesuffix("_text")
    return {"inkling_mm_model": "inkling", "qwen3_vl_moe": "qwen3_vl_moe", "kimi_k25": "kimi_k2"}.get(family, family)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Sizes of one config by any of their names."""

    config: Config
    name: str

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        return self._whole(names, default, low=1)

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 0; null counts as absent."""
        return self._whole(names, default, low=0)

    def layers(self, *names: str) -> int:
        """A number of layers: what is described layer by layer must be bounded."""
        count = self.size(*names)
        if count > _MOST_LAYERS:
            raise ValueError(f"config of {self.name}: {names[0]} = {count} is out of range")
        return count

    def mapping(self, name: str) -> Config | None:
        """A nested configuration, or None."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config of {self.name}: {name} must be a mapping, got {value!r:.40}")
        return value

    def words(self, name: str) -> list[str]:
        """A list of names; empty where there is none."""
        value = self._listed(name)
        if not all(isinstance(each, str) for each in value):
            raise ValueError(f"config of {self.name}: {name} must be a list of names, got {value!r:.40}")
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers; empty where there is none."""
        value = self._listed(name)
        if not all(isinstance(each, int) for each in value):
            raise ValueError(f"config of {self.name}: {name} must be a list of whole numbers, got {value!r:.40}")
        return value

    def _listed(self, name: str) -> list[Any]:
        value = self.config.get(name) or []
        if not isinstance(value, list) or len(value) > _MOST_LAYERS:
            raise ValueError(f"config of {self.name}: {name} must be a list, one entry a layer")
        return value

    def has(self, *names: str) -> bool:
        """Whether any of the keys has a value."""
        return any(self.config.get(each) is not None for each in names)

    def _whole(self, names: tuple[str, ...], default: int | None, low: int) -> int:
        for each in names:
            value = self.config.get(each)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"config of {self.name}: {each} must be a whole number, got {value!r}")
            if not low <= value < _ABSURD_SIZE:
                raise ValueError(f"config of {self.name}: {each} = {value} is out of range")
            return value
        if default is None:
            raise ValueError(f"config of {self.name}: {names[0]} is missing")
        return default


def _layers(keys: _Keys, quirk: _Quirk, family: str, hidden: int) -> list[LayerKind]:
    if family == "nemotron_h":
        return _hybrid_layers(keys, quirk)
    count = keys.layers("num_hidden_layers", "n_layer", "n_layers")
    kinds = _layer_types(keys, count)
    moe = _moe_layers(keys, count)
    out = []
    for at, kind in enumerate(kinds):
        mixer = _mixer(keys, quirk, family, hidden, kind, at)
        ffn = _moe_ffn(keys, quirk, family) if moe[at] else _dense_ffn(keys, quirk, hidden)
        norms = quirk.norm_vectors + (3 if family == "gemma4" and moe[at] else 0)
        streams = keys.size("hc_mult", default=1) if family == "deepseek_v4" else 1
        out.append(LayerKind(mixer=mixer, ffn=ffn, norm_vectors=norms, norm_bias=quirk.norm_bias, residual_streams=streams))
    return out


def _layer_types(keys: _Keys, count: int) -> list[str]:
    config = keys.config
    if types := keys.words("layer_types"):
        return _for_every_layer(keys, "layer_types", types, count)
    if ratios := keys.numbers("compress_ratios"):
        return [f"compressed_{ratio}" for ratio in _for_every_layer(keys, "compress_ratios", ratios, count)]
    if keys.has("linear_num_value_heads"):
        every = keys.size("full_attention_interval", default=4)
        return ["linear_attention" if (at + 1) % every else "full_attention" for at in range(count)]
    if pattern := keys.count("sliding_window_pattern", default=0):
        return ["sliding_attention" if (at + 1) % pattern else "full_attention" for at in range(count)]
    if keys.has("sliding_window") and config.get("use_sliding_window", True) and not keys.has("max_window_layers"):
        return ["sliding_attention"] * count
    return ["full_attention"] * count


def _for_every_layer(keys: _Keys, name: str, values: list[T], count: int) -> list[T]:
    if len(values) < count:
        raise ValueError(f"config of {keys.name}: {name} names {len(values)} layers of {count}")
    return values[:count]


def _moe_layers(keys: _Keys, count: int) -> list[bool]:
    config = keys.config
    if not keys.has("num_experts", "n_routed_experts", "num_local_experts") or config.get("enable_moe_block") is False:
        return [False] * count
    if types := keys.words("mlp_layer_types"):
        return [each != "dense" for each in _for_every_layer(keys, "mlp_layer_types", types, count)]
    dense = set(keys.numbers("mlp_only_layers"))
    step = keys.size("decoder_sparse_step", default=1)
    first = keys.count("first_k_dense_replace", default=0)
    if isinstance(config.get("moe_layer_freq"), list):
        freq = keys.numbers("moe_layer_freq")
        return [bool(each) for each in _for_every_layer(keys, "moe_layer_freq", freq, count)]
    return [at >= first and at not in dense and (at + 1) % step == 0 for at in range(count)]


def _mixer(keys: _Keys, quirk: _Quirk, family: str, hidden: int, kind: str, at: int) -> Mixer:
    if kind == "linear_attention":
        return _gated_delta(keys)
    if family == "deepseek_v4":
        return _compressed(keys, kind)
    if keys.has("kv_lora_rank"):
        return _latent(keys, at)
    if family == "gemma4" and kind == "full_attention":
        return _gemma4_global(keys, quirk)
    if family == "inkling":
        return _inkling(keys, hidden, sliding=kind == "hybrid_sliding")
    heads = keys.size("num_attention_heads", "n_head", "n_heads")
    kv_heads = keys.size("num_key_value_heads", default=heads)
    head_dim = keys.size("head_dim", default=max(1, hidden // heads))
    if heads % kv_heads:
        raise ValueError(f"config of {keys.name}: num_key_value_heads = {kv_heads} does not divide {heads} heads")
    return GroupedQuery(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window_tokens=keys.size("sliding_window") if "sliding" in kind else 0,
        qk_norm="head" if quirk.qk_norm == "none" and keys.config.get("use_qk_norm") else quirk.qk_norm,
        qkv_bias=quirk.qkv_bias or bool(keys.config.get("attention_bias")),
        output_bias=quirk.output_bias,
        output_gate=quirk.output_gate or bool(keys.config.get("attn_output_gate")),
        value_norm=family == "gemma4",
        extra_params=heads if quirk.sinks else 0,
    )


def _gemma4_global(keys: _Keys, quirk: _Quirk) -> GroupedQuery:
    shared = bool(keys.config.get("attention_k_eq_v"))
    kv_heads = keys.size("num_key_value_heads")
    return GroupedQuery(
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_global_key_value_heads", default=kv_heads) if shared else kv_heads,
        head_dim=keys.size("global_head_dim", default=512),
        qk_norm=quirk.qk_norm,
        value_is_key=shared,
        value_norm=True,
    )


def _inkling(keys: _Keys, hidden: int, sliding: bool) -> GroupedQuery:
    prefix = "swa_" if sliding else ""
    heads = keys.size(prefix + "num_attention_heads", "num_attention_heads")
    kv_heads = keys.size(prefix + "num_key_value_heads", "num_key_value_heads")
    head_dim = keys.size(prefix + "head_dim", "head_dim")
    kernel = keys.size("conv_kernel_size", default=4)
    rel = keys.size("d_rel")
    window = keys.size("sliding_window_size") if sliding else 0
    reach = window or keys.size("rel_extent", default=1024)
    convolutions = kernel * (2 * kv_heads * head_dim + 2 * hidden)
    return GroupedQuery(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window_tokens=window,
        qk_norm="head",
        extra_params=convolutions + hidden * heads * rel + rel * reach,
    )


def _gated_delta(keys: _Keys) -> GatedDelta:
    return GatedDelta(
        key_heads=keys.size("linear_num_key_heads"),
        value_heads=keys.size("linear_num_value_heads"),
        key_dim=keys.size("linear_key_head_dim"),
        value_dim=keys.size("linear_value_head_dim"),
        conv_kernel=keys.size("linear_conv_kernel_dim", default=4),
    )


def _latent(keys: _Keys, at: int) -> MultiLatent:
    return MultiLatent(
        heads=keys.size("num_attention_heads"),
        q_lora_rank=keys.count("q_lora_rank", default=0),
        kv_lora_rank=keys.size("kv_lora_rank"),
        nope_dim=keys.size("qk_nope_head_dim"),
        rope_dim=keys.size("qk_rope_head_dim"),
        value_dim=keys.size("v_head_dim"),
        indexer=_indexer(keys) if keys.has("index_n_heads") and _owns_indexer(keys, at) else None,
    )


def _owns_indexer(keys: _Keys, at: int) -> bool:
    """GLM-5.2 shares one index mask among `index_topk_freq` layers."""
    if types := keys.words("indexer_types"):
        return _for_every_layer(keys, "indexer_types", types, at + 1)[at] == "full"
    freq = keys.size("index_topk_freq", default=1)
    offset = keys.count("index_skip_topk_offset", default=2)
    return max(at - offset + 1, 0) % freq == 0


def _indexer(keys: _Keys) -> Indexer:
    return Indexer(
        heads=keys.size("index_n_heads"),
        head_dim=keys.size("index_head_dim"),
        topk_tokens=keys.size("index_topk", default=2048),
    )


_COMPRESS_RATIO = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
    "compressed_0": 0,
    "compressed_4": 4,
    "compressed_128": 128,
}


def _compressed(keys: _Keys, kind: str) -> CompressedLatent:
    if kind not in _COMPRESS_RATIO:
        raise ValueError(f"config of {keys.name}: layer_types has {kind!r}, not one of {', '.join(_COMPRESS_RATIO)}")
    ratio = _COMPRESS_RATIO[kind]
    return CompressedLatent(
        heads=keys.size("num_attention_heads"),
        head_dim=keys.size("head_dim", default=512),
        rope_dim=keys.size("qk_rope_head_dim", default=64),
        q_lora_rank=keys.size("q_lora_rank"),
        output_groups=keys.size("o_groups"),
        output_lora_rank=keys.size("o_lora_rank"),
        window_tokens=keys.size("sliding_window", default=128),
        compress_ratio=ratio,
        indexer=_indexer(keys) if ratio == 4 else None,
    )


def _dense_ffn(keys: _Keys, quirk: _Quirk, hidden: int) -> DenseFfn:
    default = 4 * hidden if keys.has("n_embd", "d_model") else None
    size = keys.size("dense_intermediate_size", "intermediate_size", "ffn_hidden_size", "n_inner", default=default)
    return DenseFfn(size=size, gated=quirk.gated, bias=quirk.norm_bias and quirk.output_bias, gelu=quirk.gelu)


def _moe_ffn(keys: _Keys, quirk: _Quirk, family: str) -> MoeFfn:
    experts = keys.size("num_experts", "n_routed_experts", "num_local_experts")
    size = keys.size("moe_intermediate_size", "intermediate_size")
    shared = keys.count(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", default=0
    )
    topk = keys.size("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
    if topk > experts:
        raise ValueError(f"config of {keys.name}: num_experts_per_tok = {topk} of {experts} experts")
    return MoeFfn(
        experts=experts,
        topk=topk,
        size=size,
        gated=quirk.gated,
        bias=quirk.expert_bias,
        shared_size=shared or keys.count("n_shared_experts", default=0) * size,
        shared_gate=quirk.shared_gate and shared > 0,
        latent_size=keys.count("moe_latent_size", default=0),
        parallel_dense_size=keys.size("intermediate_size") if family == "gemma4" else 0,
        router_params_extra=_router_extra(keys, quirk, family, experts),
        gelu=quirk.gelu,
    )


def _router_extra(keys: _Keys, quirk: _Quirk, family: str, experts: int) -> int:
    if family == "gemma4":
        return keys.size("hidden_size") + experts
    if family == "inkling":
        return keys.count("n_shared_experts", default=0) * keys.size("hidden_size") + experts + 1
    return experts if quirk.router_bias else 0


def _hybrid_layers(keys: _Keys, quirk: _Quirk) -> list[LayerKind]:
    letters_of = keys.config.get("hybrid_override_pattern")
    pattern = list(letters_of) if isinstance(letters_of, str) else keys.words("hybrid_override_pattern")
    pattern = pattern or keys.words("layers_block_type") or keys.words("layer_types")
    if not pattern or len(pattern) > _MOST_LAYERS:
        raise ValueError(f"config of {keys.name}: hybrid_override_pattern is missing or has {len(pattern)} layers")
    hidden = keys.size("hidden_size")
    letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}
    made: dict[str, LayerKind] = {}
    out = []
    for block in pattern:
        letter = letters.get(block, block)
        if letter not in made:
            made[letter] = _hybrid_layer(keys, quirk, letter, hidden)
        out.append(made[letter])
    return out


def _hybrid_layer(keys: _Keys, quirk: _Quirk, letter: str, hidden: int) -> LayerKind:
    mixer: Mixer | None = None
    ffn: Ffn | None = None
    if letter == "M":
        mixer = Mamba2(
            heads=keys.size("mamba_num_heads"),
            head_dim=keys.size("mamba_head_dim"),
            groups=keys.size("n_groups", "mamba_n_groups"),
            state_dim=keys.size("ssm_state_size"),
            conv_kernel=keys.size("conv_kernel", "mamba_d_conv", default=4),
        )
    elif letter == "*":
        heads = keys.size("num_attention_heads")
        mixer = GroupedQuery(
            heads=heads,
            kv_heads=keys.size("num_key_value_heads", default=heads),
            head_dim=keys.size("head_dim", default=max(1, hidden // heads)),
        )
    elif letter == "E":
        ffn = _moe_ffn(keys, quirk, "nemotron_h")
    elif letter == "-":
        ffn = DenseFfn(size=keys.size("intermediate_size"), gated=False)
    else:
        raise ValueError(f"config of {keys.name}: hybrid_override_pattern has {letter!r}, not one of M * E -")
    return LayerKind(mixer=mixer, ffn=ffn, norm_vectors=1)


def _stream_head_params(layers: list[LayerKind], hidden: int) -> int:
    """The mixing that folds DeepSeek-V4's residual streams into one before the head."""
    streams = max((layer.residual_streams for layer in layers), default=1)
    return streams * streams * hidden + streams + 1 if streams > 1 else 0


def _vision(config: Config | None, text: _Keys) -> VisionTower | None:
    """A plain vision transformer: patches, layers with biases, and a merging projection into the text model."""
    if not config:
        return None
    keys = _Keys(config, f"{text.name} (vision_config)")
    layers = min(_MOST_LAYERS, keys.count("depth", "num_hidden_layers", default=0))
    hidden = keys.count("embed_dim", "hidden_size", default=0)
    if not layers or not hidden:
        return None
    ffn = keys.size("intermediate_size", default=4 * hidden)
    patch = config.get("patch_size", 14)
    area = patch**2 if isinstance(patch, int) and 0 < patch <= _MOST_LAYERS else 196
    merge = keys.size("spatial_merge_size", default=1) ** 2
    out = keys.size("out_hidden_size", default=text.size("hidden_size"))
    matrices = 3 if config.get("model_type") == "gemma4_vision" else 2  # its feed-forward part is gated
    layer = 4 * hidden * hidden + 4 * hidden + matrices * hidden * ffn + hidden + ffn + 4 * hidden
    patches = hidden * (area * keys.size("in_channels", default=3) * keys.size("temporal_patch_size", default=1) + 1)
    positions = keys.count("num_position_embeddings", default=0) * hidden
    wide = hidden * merge
    merger = wide * wide + wide + wide * out + out + 2 * hidden
    mergers = 1 + len(keys.numbers("deepstack_visual_indexes"))
    total = layers * layer + patches + positions + mergers * merger
    return VisionTower(layers=layers, hidden_size=hidden, params=total)
