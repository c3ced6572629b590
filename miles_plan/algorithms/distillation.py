"""On-policy distillation: the student samples, the teacher scores each token.

The reverse KL(student || teacher) at a sampled token is log student - log teacher; its negative is the token's advantage
(Thinking Machines, "On-Policy Distillation", 2025; GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543). No discount: each token
answers for itself.
"""

from __future__ import annotations

import numpy as np

from miles_plan.data.batch import Array, SampleBatch


def distillation_advantages(batch: SampleBatch, *, coefficient: float = 1.0, add_to_advantage: bool = False) -> Array:
    """coefficient x (teacher - student log-prob) for each response token, float32 [R].

    Reads the columns `teacher_log_probs` and `old_log_probs`; with add_to_advantage also `advantage`, to which the term is
    added. ValueError for a missing column or log-probs that are not finite.
    """
    needed = ("teacher_log_probs", "old_log_probs", *(("advantage",) if add_to_advantage else ()))
    if missing := [name for name in needed if name not in batch.columns]:
        raise ValueError(f"the batch has no columns {missing}; it has {sorted(batch.columns)}")
    teacher, student = (np.asarray(batch.columns[name], dtype=np.float64) for name in needed[:2])
    advantages = coefficient * (teacher - student)
    if not np.isfinite(advantages).all():
        raise ValueError("teacher or student log-probs are not finite")
    if add_to_advantage:
        advantages = advantages + batch.columns["advantage"]
    return advantages.astype(np.float32)
