"""Pages of MP3xx, precision and routing: formats and alignment (MP30x), speculative decoding (MP31x)."""

from __future__ import annotations

from miles_plan.diagnostics.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="MP301",
        title="number formats that cannot be paired",
        what="The rollout's number format and the trainer's are not a pair that any backend converts between.",
        why="Weights of one side could not be loaded by the other, or their log-probs would not be comparable.",
        example="precision: {train: nvfp4, rollout: int4}",
        fix="Use a training format that the help line names.",
    ),
    Page(
        code="MP302",
        title="number format that the GPU cannot compute in",
        what="A GPU of the cluster has no arithmetic for the format asked for.",
        why="Kernels for it do not exist on that chip; MXFP8 and NVFP4 need Blackwell, FP8 needs Hopper or later.",
        example="cluster: {gpu: h100}\nprecision: {train: nvfp4, rollout: nvfp4}",
        fix="Use another GPU or another format; bf16 runs everywhere.",
    ),
    Page(
        code="MP303",
        title="number format that the embedded engine does not have",
        what="The torch engine computes in bf16 or fp32 and was asked for another format.",
        why="Low-precision kernels come with Megatron-core and SGLang.",
        example="train: {engine: torch}\nprecision: {train: fp8_blockwise}",
        fix="Use bf16 or fp32, or the megatron and sglang engines.",
    ),
    Page(
        code="MP304",
        title="exact alignment that cannot be kept",
        what="`precision.alignment: exact` promises equal log-probs bit for bit, and something in the job makes them differ.",
        why="The run would stop at the first step, when its guard finds a difference.",
        example="precision: {alignment: exact, train: bf16, rollout: fp8_blockwise}",
        fix="Remove the difference that the message names, or use `alignment: replay` or `corrected`.",
    ),
    Page(
        code="MP305",
        title="routing replay without experts",
        what="`precision.alignment: replay` replays the routing of a mixture-of-experts model, and this model is dense.",
        why="There is nothing to replay, so the setting would promise what it does not do.",
        example="model: {name: qwen3-8b}\nprecision: {alignment: replay}",
        fix="Use `exact`, `corrected` or `off`.",
    ),
    Page(
        code="MP310",
        title="no multi-token-prediction layer",
        what="Speculative decoding by `mtp` uses the model's own multi-token-prediction layer, and this model has none.",
        why="There is no draft to propose tokens.",
        example="model: {name: qwen3-8b}\nrollout: {speculative: {method: mtp}}",
        fix="Use `method: eagle`, or a model with such a layer.",
    ),
    Page(
        code="MP311",
        title="too few draft tokens",
        what="`rollout.speculative.draft_tokens` is smaller than one branch needs: a token for each draft step and one bonus.",
        why="The last draft steps would never be verified.",
        example="rollout: {speculative: {method: eagle, steps: 4, topk: 2, draft_tokens: 3}}",
        fix="Use at least steps + 1, or leave `draft_tokens` out.",
    ),
)
