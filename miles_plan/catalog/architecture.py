"""What a language model is made of, as numbers: enough to count parameters, bytes and FLOPs, and nothing about code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles_plan.catalog.ffns import FFNS, Ffn, MoeFfn
from miles_plan.catalog.mixers import MIXERS, GroupedQuery, Indexer, Mixer, MultiLatent


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """One kind of layer: a mixer, a feed-forward part, or both (Nemotron-H alternates single ones).

    norm_vectors: norm weights of hidden size in the layer; residual_streams: parallel residual streams of manifold
    hyper-connections (DeepSeek-V4), 1 = the usual residual.
    """

    mixer: Mixer | None = None
    ffn: Ffn | None = None
    norm_vectors: int = 2
    norm_bias: bool = False
    residual_streams: int = 1

    def sharded_params(self, hidden: int) -> int:
        """Parameters that tensor parallelism splits."""
        return sum(part.sharded_params(hidden) for part in (self.mixer, self.ffn) if part)

    def norm_params(self, hidden: int) -> int:
        """Layer norms and hyper-connections."""
        norms = self.norm_vectors * hidden * (2 if self.norm_bias else 1)
        if (streams := self.residual_streams) == 1:
            return norms
        mixes = (2 + streams) * streams
        return norms + 2 * (mixes * streams * hidden + mixes + 3)

    def replicated_params(self, hidden: int) -> int:
        """Parameters that every tensor-parallel rank keeps whole."""
        own = sum(part.replicated_params(hidden) for part in (self.mixer, self.ffn) if part)
        return own + self.norm_params(hidden)

    def expert_params(self, hidden: int) -> int:
        """Routed experts, split by expert parallelism."""
        return self.ffn.expert_params(hidden) if self.ffn else 0

    def params(self, hidden: int) -> int:
        """All parameters of the layer."""
        return self.sharded_params(hidden) + self.replicated_params(hidden) + self.expert_params(hidden)

    def active_params(self, hidden: int) -> int:
        """Parameters one token meets."""
        unused = 0
        if isinstance(self.ffn, MoeFfn):
            unused = (self.ffn.experts - self.ffn.topk) * self.ffn.one_expert_params(hidden)
        return self.params(hidden) - unused


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTower:
    """The image encoder: counted, held in memory, never split."""

    layers: int
    hidden_size: int
    params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """A decoder-only language model.

    runs: (index into kinds, number of layers) in model order. learned_positions: rows of a learned position table.
    mtp_layers: extra multi-token-prediction layers, each of the last kind, with its own projection of two hidden
    vectors and three norms (DeepSeek-V3). logit_softcap: the logits pass a scaled tanh (Gemma). All `params_*` are of the
    text model without those layers; see `params_checkpoint`.
    """

    name: str
    source: str
    hidden_size: int
    vocab_size: int
    tie_embeddings: bool
    kinds: tuple[LayerKind, ...]
    runs: tuple[tuple[int, int], ...]
    learned_positions: int = 0
    mtp_layers: int = 0
    final_norm_vectors: int = 1
    extra_params: int = 0
    vision: VisionTower | None = None
    logit_softcap: bool = False

    @property
    def num_layers(self) -> int:
        """Layers of the text model."""
        return sum(count for _, count in self.runs)

    def layer_kinds(self) -> tuple[int, ...]:
        """Index into `kinds` of every layer in order."""
        return tuple(kind for kind, count in self.runs for _ in range(count))

    def layers(self) -> Iterator[tuple[LayerKind, int]]:
        """Each kind with how many layers of it there are."""
        counts = [0] * len(self.kinds)
        for kind, count in self.runs:
            counts[kind] += count
        return zip(self.kinds, counts, strict=True)

    @property
    def embedding_params(self) -> int:
        """The token table and learned positions."""
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def head_params(self) -> int:
        """The output projection where it is not the token table."""
        return 0 if self.tie_embeddings else self.vocab_size * self.hidden_size

    @property
    def mtp_params(self) -> int:
        """Multi-token-prediction layers; embedding and head are shared with the model."""
        hidden = self.hidden_size
        layer = self.kinds[self.runs[-1][0]].params(hidden) + 2 * hidden * hidden + 3 * hidden
        return self.mtp_layers * layer

    @property
    def params_total(self) -> int:
        """Parameters of the text model: embedding, layers, final norm, head."""
        parts = self.params_by_component()
        return sum(parts.values()) - parts["mtp"] - parts["vision"]

    @property
    def params_active(self) -> int:
        """Parameters one token meets, embedding and head included (the convention of model cards varies)."""
        hidden = self.hidden_size
        unused = sum(count * (kind.params(hidden) - kind.active_params(hidden)) for kind, count in self.layers())
        return self.params_total - unused

    @property
    def params_active_nonembedding(self) -> int:
        """Active parameters without the token table and the head."""
        return self.params_active - self.embedding_params - self.head_params

    @property
    def params_checkpoint(self) -> int:
        """What a published checkpoint holds: text model, multi-token prediction and vision tower."""
        return sum(self.params_by_component().values())

    def params_by_component(self) -> dict[str, int]:
        """Parameters by part: embedding, head, attention, ffn (dense, shared, router), experts, norms, mtp, vision."""
        hidden = self.hidden_size
        parts = {"embedding": self.embedding_params, "head": self.head_params, "attention": 0, "ffn": 0, "experts": 0}
        parts["norms"] = self.final_norm_vectors * hidden + self.extra_params
        for kind, count in self.layers():
            mixer = kind.mixer
            attention = mixer.sharded_params(hidden) + mixer.replicated_params(hidden) if mixer else 0
            parts["attention"] += count * attention
            parts["experts"] += count * kind.expert_params(hidden)
            parts["norms"] += count * kind.norm_params(hidden)
            rest = attention + kind.expert_params(hidden) + kind.norm_params(hidden)
            parts["ffn"] += count * (kind.params(hidden) - rest)
        parts["mtp"] = self.mtp_params
        parts["vision"] = self.vision.params if self.vision else 0
        return parts

    @property
    def moe(self) -> MoeFfn | None:
        """The routed feed-forward part, if any layer has one."""
        return next((kind.ffn for kind in self.kinds if isinstance(kind.ffn, MoeFfn)), None)

    @property
    def attention_heads(self) -> int:
        """Query heads that tensor parallelism has to divide; 0 for a model without softmax attention."""
        return next((heads for kind in self.kinds if (heads := getattr(kind.mixer, "heads", 0))), 0)

    @property
    def kv_heads(self) -> int:
        """Key/value heads; latent attention shares one latent among all heads."""
        kinds = (kind.mixer for kind in self.kinds)
        for mixer in kinds:
            if isinstance(mixer, GroupedQuery):
                return mixer.kv_heads
            if isinstance(mixer, MultiLatent):
                return mixer.heads
        return self.attention_heads

    def cut(self, num_layers: int, name: str) -> ModelArchitecture:
        """The same model with only its first layers, for tests on few GPUs."""
        if not 0 < num_layers <= self.num_layers:
            raise ValueError(f"{self.name} has {self.num_layers} layers, cannot keep {num_layers}")
        return dataclasses.replace(self, name=name, runs=_runs(self.layer_kinds()[:num_layers]))


def model_from_layers(layers: list[LayerKind], **fields: Any) -> ModelArchitecture:
    """Build an architecture from one LayerKind a layer, in order."""
    kinds = tuple(dict.fromkeys(layers))
    index = {kind: at for at, kind in enumerate(kinds)}
    return ModelArchitecture(kinds=kinds, runs=_runs(tuple(index[layer] for layer in layers)), **fields)


def _runs(layer_kinds: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for kind in layer_kinds:
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + 1)
        else:
            runs.append((kind, 1))
    return tuple(runs)


def architecture_to_dict(model: ModelArchitecture) -> dict[str, Any]:
    """Plain JSON form: defaults left out, mixers and feed-forward parts tagged with their kind."""
    return _plain(model)


def _plain(value: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": value.kind} if hasattr(value, "kind") else {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item == field.default:
            continue
        if field.name == "kinds":
            out[field.name] = [_plain(kind) for kind in item]
        elif dataclasses.is_dataclass(item):
            out[field.name] = _plain(item)
        else:
            out[field.name] = [list(run) for run in item] if field.name == "runs" else item
    return out


def architecture_from_dict(data: Mapping[str, Any]) -> ModelArchitecture:
    """Read the plain form back.

    Raises:
        ValueError: a key is unknown or missing, a kind has no such name, or a size is not a number that can be.
    """
    fields = dict(data)
    try:
        fields["kinds"] = tuple(_layer_kind(kind) for kind in fields.get("kinds", ()))
        fields["runs"] = tuple((int(kind), int(count)) for kind, count in fields.get("runs", ()))
        if fields.get("vision"):
            fields["vision"] = VisionTower(**fields["vision"])
        model = ModelArchitecture(**fields)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"architecture of {fields.get('name', 'the model')}: {error}") from error
    if problem := next(problems(model), None):
        raise ValueError(f"architecture of {model.name}: {problem}")
    return model


def _layer_kind(data: Mapping[str, Any]) -> LayerKind:
    fields = dict(data)
    if mixer := fields.get("mixer"):
        sizes = dict(mixer)
        if sizes.get("indexer"):
            sizes["indexer"] = Indexer(**sizes["indexer"])
        fields["mixer"] = _tagged(MIXERS, sizes)
    if ffn := fields.get("ffn"):
        fields["ffn"] = _tagged(FFNS, dict(ffn))
    return LayerKind(**fields)


def _tagged(kinds: Mapping[str, type[Any]], sizes: dict[str, Any]) -> Any:
    kind = sizes.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind](**sizes)


def problems(model: ModelArchitecture) -> Iterator[str]:
    """What is impossible about the numbers, each as `path: reason`."""
    if found := next(_wrong_types("", model), None):
        yield found
        return
    yield from _bad_sizes("", model, optional={"learned_positions", "mtp_layers", "extra_params"})
    if not model.runs:
        yield "runs: the model has no layers"
    if model.num_layers > _MOST_LAYERS:
        yield f"runs: {model.num_layers} layers are out of range"
    for at, (kind, count) in enumerate(model.runs):
        if not 0 <= kind < len(model.kinds) or count < 1:
            yield f"runs[{at}]: kind {kind} times {count} is not a run of a known kind"
    for at, layer in enumerate(model.kinds):
        for name in ("mixer", "ffn"):
            if (part := getattr(layer, name)) is not None:
                yield from _bad_sizes(f"kinds[{at}].{name}.", part, optional=_MAY_BE_ZERO)
        if isinstance(layer.ffn, MoeFfn) and layer.ffn.topk > layer.ffn.experts:
            yield f"kinds[{at}].ffn.topk: {layer.ffn.topk} of {layer.ffn.experts} experts"


_MAY_BE_ZERO = {
    "window_tokens",
    "extra_params",
    "q_lora_rank",
    "compress_ratio",
    "shared_size",
    "latent_size",
    "parallel_dense_size",
    "router_params_extra",
}
_ABSURD_SIZE = 1 << 31
_MOST_LAYERS = 4096


def _wrong_types(path: str, part: Any) -> Iterator[str]:
    """Fields whose value is not of the type that its class declares."""
    declared = {"int": int, "bool": bool, "str": str}
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{path}{field.name}"
        want = declared.get(str(field.type))
        if want and (not isinstance(value, want) or (want is int and isinstance(value, bool))):
            yield f"{name}: must be {_TYPE_WORDS[want]}, got {value!r:.40}"
        elif str(field.type).startswith("Literal") and not isinstance(value, str):
            yield f"{name}: must be a name, got {value!r:.40}"
        elif field.name == "kinds":
            for at, kind in enumerate(value):
                yield from _wrong_types(f"kinds[{at}].", kind)
        elif dataclasses.is_dataclass(value):
            yield from _wrong_types(f"{name}.", value)
        elif value is not None and field.name in ("mixer", "ffn", "vision", "indexer"):
            yield f"{name}: must be a mapping, got {value!r:.40}"


_TYPE_WORDS: dict[type, str] = {int: "a whole number", bool: "true or false", str: "a text"}


def _bad_sizes(path: str, part: Any, optional: set[str]) -> Iterator[str]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        low = 0 if field.name in optional else 1
        if not low <= value < _ABSURD_SIZE:
            yield f"{path}{field.name}: {value} is out of range"
