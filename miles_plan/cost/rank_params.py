"""Parameters one rank of a trainer holds, by how they are replicated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from miles_plan.catalog.architecture import LayerKind, ModelArchitecture
from miles_plan.cost.columns import Floats, LayoutColumns, stage_kinds
from miles_plan.cost.gemms import layer_gemms


@dataclass(frozen=True, slots=True)
class ParamColumns:
    """Parameters of one rank by how they are replicated, shape [n, pp]; the vision tower's are among the dense ones."""

    dense: Floats
    expert: Floats
    quantizable: Floats
    vision: Floats

    @property
    def total(self) -> Floats:
        """All parameters of the rank."""
        return self.dense + self.expert

    def trained(self, frozen_vision: bool) -> ParamColumns:
        """Those that gradients and optimizer state are kept of."""
        return replace(self, dense=self.dense - self.vision) if frozen_vision else self


def rank_params(model: ModelArchitecture, columns: LayoutColumns) -> ParamColumns:
    """Parameters each pipeline rank holds, of the tensor and expert rank that holds most."""
    hidden = model.hidden_size
    counts = stage_kinds(model, columns)
    sharded = counts @ np.array([kind.sharded_params(hidden) for kind in model.kinds], dtype=np.float64)
    copied = counts @ np.array([kind.replicated_params(hidden) for kind in model.kinds], dtype=np.float64)
    expert = counts @ np.array([kind.expert_params(hidden) for kind in model.kinds], dtype=np.float64)
    gemm = counts @ np.array([_dense_gemm_params(kind, hidden) for kind in model.kinds], dtype=np.float64)
    ends, head_split = _end_params(model, columns.pp, columns.mtp_layers)
    tp = columns.tp[:, None]
    dense = sharded / tp + copied + ends / tp + head_split
    experts = expert / (columns.ep * columns.etp)[:, None]
    vision = np.zeros_like(dense)
    vision[:, 0] = model.vision.params if model.vision else 0
    return ParamColumns(dense=dense, expert=experts, quantizable=gemm / tp + experts, vision=vision)


def _dense_gemm_params(kind: LayerKind, hidden: int) -> float:
    gemms = (gemm for gemm in layer_gemms(kind, hidden) if not gemm.experts and gemm.name != "router")
    return float(sum(gemm.n * gemm.k for gemm in gemms))


def _end_params(model: ModelArchitecture, pp: int, mtp_layers: int) -> tuple[Floats, Floats]:
    """Embedding and head (split by tp) and what the ends replicate, shape [pp]."""
    split, copied = np.zeros(pp), np.zeros(pp)
    split[0] += model.vocab_size * model.hidden_size
    copied[0] += model.learned_positions * model.hidden_size + (model.vision.params if model.vision else 0)
    if not model.tie_embeddings or pp > 1:
        split[-1] += model.vocab_size * model.hidden_size
    copied[-1] += model.final_norm_vectors * model.hidden_size + model.extra_params
    if mtp_layers:  # each joins two hidden vectors under three norms, and a replica of the embedding feeds them
        copied[-1] += mtp_layers * (2 * model.hidden_size + 3) * model.hidden_size
        split[-1] += model.vocab_size * model.hidden_size if pp > 1 else 0
    return split, copied
