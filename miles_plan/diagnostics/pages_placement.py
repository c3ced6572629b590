"""Pages of MP2xx, placement and memory: layouts (MP20x), schedules (MP21x), weight sync (MP22x)."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP210",
        title="overlap on shared GPUs",
        what="The schedule runs rollout and training at the same time, and the placement gives both the same GPUs.",
        why="Engines that share GPUs take turns: one sleeps while the other works, so nothing can overlap.",
        example="placement: auto      # decided: colocate\nschedule: {mode: one_step_off}",
        fix="Use `placement: disaggregate` (or `{rollout_gpus: N}`), or `schedule.mode: synchronous`.",
    ),
    Page(
        code="MP211",
        title="staleness that does not go with the mode",
        what="`schedule.max_staleness` is not what the mode means: one step off is one weight version behind, no more.",
        why="The bound would be either never reached or never kept.",
        example="schedule: {mode: one_step_off, max_staleness: 4}",
        fix="Leave `max_staleness` out, or choose `mode: asynchronous`.",
    ),
    Page(
        code="MP220",
        title="weight transport that cannot connect the engines",
        what="`weight_sync.transport` names a way of moving weights that these engines, placed like this, do not have: shared "
        "memory and CUDA IPC stay inside one node, NCCL needs different GPUs at both ends.",
        why="The first weight update would hang or fail.",
        example="placement: disaggregate\nweight_sync: {transport: cuda_ipc}",
        fix="Use one of the transports that the help line names, or `auto`.",
    ),
)
