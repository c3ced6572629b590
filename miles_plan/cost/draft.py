"""The draft of speculative decoding: what it weighs beside the policy, in the trainer, the engine and on the wire."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.catalog.ffns import DenseFfn, MoeFfn

DraftMethod = Literal["mtp", "eagle"]


@dataclass(frozen=True, slots=True)
class Draft:
    """One decoder layer of a draft and the join in front of it; embedding and head are the policy's."""

    layer: LayerKind
    hidden: int

    @property
    def join_params(self) -> int:
        """Two hidden vectors projected to one, under three norms (DeepSeek-V3's prediction layer, EAGLE's fusion)."""
        return 2 * self.hidden * self.hidden + 3 * self.hidden

    @property
    def params(self) -> int:
        """Everything that is the draft's own."""
        return self.layer.params(self.hidden) + self.join_params


def draft_of(model: ModelArchitecture, method: DraftMethod) -> Draft:
    """The draft of a model.

    mtp: a prediction layer, of the kind of the model's last. eagle: a dense layer with the model's attention, as wide as
    what one token meets of its experts (arXiv 2401.15077, 2503.01840).
    """
    layer = next((kind for kind in (model.kinds[at] for at, _ in reversed(model.runs)) if kind.mixer and kind.ffn), None)
    if layer is None:  # mixers and feed-forward parts are layers of their own: the last of each
        kinds = [model.kinds[at] for at, _ in reversed(model.runs)]
        mixer = next((kind.mixer for kind in kinds if kind.mixer), None)
        ffn = next((kind.ffn for kind in kinds if kind.ffn), None)
        layer = LayerKind(mixer=mixer, ffn=ffn)
    if method == "eagle" and isinstance(layer.ffn, MoeFfn):
        wide = layer.ffn.topk * layer.ffn.size + layer.ffn.shared_size + layer.ffn.parallel_dense_size
        layer = replace(layer, ffn=DenseFfn(size=wide, gated=layer.ffn.gated))
    return Draft(layer, model.hidden_size)
