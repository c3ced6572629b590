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
        code="MP402",
        title="file that is no usable plan",
        what="A plan file is missing, is no plan, was changed after it was written, or comes from another plan schema version.",
        why="What runs must be what was reviewed, and what is shown must be what would run.",
        example="error[MP402]: plan.json was changed after it was written: its digest is 3f2a91c0d4e5, it claims 9b04e1d2c3f4",
        fix="Compile the spec again: `miles-plan compile spec.yaml -o plan.json`.",
    ),
    Page(
        code="MP403",
        title="report that cannot be written",
        what="The page or the trace cannot be written where it was to go.",
        why="Nothing is left half written: an older report stays as it was.",
        example="error[MP403]: /read-only/report.html: Permission denied",
        fix="Name another place with `--out` or `--trace`, or make room.",
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
