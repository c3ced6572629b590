"""Pages of MP4xx, backends and environment."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP401",
        title="engine that needs GPUs",
        what="An engine that only runs on GPUs is named for a cluster of kind `cpu`.",
        why="Megatron-core, FSDP2 and SGLang have no CPU form; the embedded torch engines do.",
        example="cluster: {gpu: cpu}\ntrain: {engine: megatron}",
        fix="Use `engine: torch`, or name the cluster's GPU.",
    ),
    Page(
        code="MP410",
        title="engine without speculative decoding",
        what="The embedded torch rollout engine was asked to decode speculatively.",
        why="It decodes one token at a time; drafts and their verification come with SGLang.",
        example="rollout: {engine: torch, speculative: {method: eagle}}",
        fix="Leave `rollout.speculative` out, or use `rollout.engine: sglang`.",
    ),
)
