"""Wrong input: a ValueError that names the argument and says what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from miles_plan.kernels.cuda.attention import attention
from miles_plan.kernels.cuda.embedding import embedding
from miles_plan.kernels.cuda.fp8_matmul import fp8_grouped_matmul, fp8_matmul, quantize_rows, quantize_weight
from miles_plan.kernels.cuda.grouped_matmul import grouped_matmul
from miles_plan.kernels.cuda.linear_log_prob import linear_log_prob
from miles_plan.kernels.cuda.log_prob import log_prob, log_softmax
from miles_plan.kernels.cuda.matmul import matmul, tree_partial
from miles_plan.kernels.cuda.moe_combine import moe_combine
from miles_plan.kernels.cuda.parallel_linear import column_parallel_linear, row_parallel_linear
from miles_plan.kernels.cuda.rms_norm import rms_norm
from miles_plan.kernels.cuda.rms_norm_module import RmsNorm
from miles_plan.kernels.cuda.rope import CacheRows, rope
from miles_plan.kernels.cuda.router import router
from miles_plan.kernels.cuda.sample import sample
from miles_plan.kernels.cuda.swiglu import swiglu
from miles_plan.kernels.cuda.verify import verify


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


def paged(**changes: object) -> None:
    given: dict[str, object] = {
        "q": half(2, 4, 64), "k": half(3, 16, 2, 64), "v": half(3, 16, 2, 64), "kv_lens": ints(20),
        "page_table": ints(0, 2)[None],
    }  # fmt: skip
    given |= changes
    attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)  # type: ignore[arg-type]  # keywords of several types


def cached_rope(**changes: torch.Tensor) -> None:
    given = {
        "q": half(2, 4, 64), "keys": half(9, 2, 64), "values": half(9, 2, 64), "v": half(2, 2, 64), "slots": ints(1, 2),
    }  # fmt: skip
    given |= changes
    q = given.pop("q")
    rope(q, half(2, 2, 64), torch.zeros(9, 32), torch.zeros(9, 32), ints(0, 1), cache=CacheRows(**given))


class Odd:
    """A Megatron-core config whose norms store their weight less one."""

    layernorm_zero_centered_gamma = True


CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: matmul(half(2, 32).double(), half(4, 32)), r"^x has dtype float64; allowed: bfloat16, float16, float32"),
    (lambda: matmul(half(2, 32), half(4, 32).half()), r"^weight has dtype float16; allowed: bfloat16"),
    (lambda: matmul(half(2, 32), half(4, 64)), r"^x has shape \[2, 32\]; allowed: \[\.\.\., 64\]"),
    (lambda: matmul(half(2, 32), half(2, 4, 32)), r"^weight has shape \[2, 4, 32\]; allowed: 2 dimensions"),
    (lambda: matmul(half(32, 2).T, half(4, 32)), r"^x has stride 2 in its last dimension; allowed: 1"),
    (lambda: matmul(half(2, 32), half(4, 32), order="ring"), r"^order is 'ring'; allowed: chain, tree"),
    (lambda: matmul(half(2, 96), half(4, 96), order="tree"), r"^x has K = 96 with order 'tree'; allowed: a multiple of 128"),
    (lambda: matmul(half(2, 32), half(4, 32), grad_order="tree"), r"^weight has N = 4 with grad_order 'tree'"),
    (
        lambda: matmul(half(2, 32), half(4, 32), out_dtype=torch.float16),
        r"^out_dtype is torch.float16; allowed: torch.bf",
    ),
    (lambda: matmul(half(2, 32), half(4, 32).to("meta")), r"^weight is on meta; allowed: cpu, where x is"),
    (lambda: tree_partial(half(2, 64), half(4, 64), 3), r"^ranks is 3; allowed: 1, 2, 4, 8"),
    (lambda: tree_partial(half(2, 48), half(4, 48), 2), r"^x has K = 48 on this rank; allowed: a multiple of 64 for 2 ranks"),
    (lambda: grouped_matmul(half(2, 32), half(3, 4, 32), ints(1, 1)), r"^counts has shape \[2\]; allowed: \[experts\] = \[3\]"),
    (lambda: grouped_matmul(half(2, 32), half(1, 4, 32), ints(2).long()), r"^counts has dtype int64; allowed: int32"),
    (lambda: grouped_matmul(half(2, 32), half(1, 4, 64), ints(2)), r"^x has K = 32; allowed: weight's K, 64"),
    (lambda: moe_combine(half(4, 8), ints(0, 1)[None].long(), torch.ones(1, 2)), r"^index has dtype int64; allowed: int32"),
    (lambda: moe_combine(half(4, 8), ints(0, 1)[None], torch.ones(2, 2)), r"^weights has shape \[2, 2\]"),
    (lambda: router(half(2, 8), 2), r"^logits has dtype bfloat16; allowed: float32"),
    (lambda: router(torch.zeros(2, 8), 9), r"^top_k is 9; allowed: 1 to 8"),
    (lambda: router(torch.zeros(2, 8), 2, scoring="tanh"), r"^scoring is 'tanh'; allowed: softmax, sigmoid"),  # type: ignore[arg-type]  # the point
    (lambda: router(torch.zeros(2, 8), 2, groups=3), r"^groups is 3 with groups_kept 1 and 8 experts; allowed: powers of two"),
    (lambda: router(torch.zeros(2, 8), 5, groups=4, groups_kept=2), r"^top_k is 5; allowed: at most the 4 experts"),
    (lambda: router(torch.zeros(2, 8), 2, ids=ints(1, 2)[None].long()), r"^ids has dtype int64; allowed: int32"),
    (
        lambda: router(torch.zeros(2, 8), 2, ids=ints(1, 2)[None]),
        r"^ids has shape \[1, 2\]; allowed: \[tokens, top_k\] = \[2, 2\]",
    ),
    (lambda: column_parallel_linear(half(2, 32), half(4, 64)), r"^x has shape \[2, 32\]; allowed: \[tokens, \.\.\., 64\]"),
    (
        lambda: column_parallel_linear(half(2, 32).requires_grad_(), half(4, 32)),
        r"^weight has N = 4 on each of 1 ranks; allowed: a mul",
    ),
    (lambda: row_parallel_linear(half(2, 32), half(4, 32).half()), r"^weight has dtype float16; allowed: bfloat16"),
    (lambda: row_parallel_linear(half(2, 96), half(4, 96)), r"^x has K = 96 with order 'tree'; allowed: a multiple of 128"),
    (lambda: RmsNorm(Odd(), 8), r"^config\.layernorm_zero_centered_gamma is set; allowed: weights that multiply"),
    (lambda: attention(half(2, 4, 40), half(2, 2, 40), half(2, 2, 40)), r"^the head size of q is 40; allowed: 16, 32, 64, 80"),
    (lambda: attention(half(2, 2, 16), half(2, 2, 16), half(2, 2, 576)), r"^the head size of v is 576; allowed: 16, .*, 512$"),
    (lambda: attention(half(2, 3, 64), half(2, 2, 64), half(2, 2, 64)), r"^q has 3 heads; allowed: a multiple of k's, 2"),
    (lambda: attention(half(2, 2, 64), half(2, 2, 128), half(2, 2, 64)), r"^k has head size 128; allowed: q's, 64"),
    (lambda: attention(half(2, 2, 64), half(2, 2, 64).half(), half(2, 2, 64)), r"^k has dtype torch.float16; allowed: q's"),
    (lambda: attention(half(2, 2, 64), half(2, 2, 64), half(3, 2, 64)), r"^v has shape \[3, 2, 64\]; allowed: k's"),
    (
        lambda: attention(half(2, 2, 64), half(2, 2, 64), half(2, 2, 64), window=0),
        r"^window is 0; allowed: at least 1",
    ),
    (
        lambda: attention(half(2, 2, 64), half(2, 2, 64), half(2, 2, 64), scale=-1.0),
        r"^scale is -1.0; allowed: a posi",
    ),
    (
        lambda: attention(half(2, 2, 64), half(2, 2, 64), half(2, 2, 64), q_starts=ints(0, 2).long()),
        r"^q_starts has dtype int",
    ),
    (lambda: paged(kv_lens=None), r"^kv_lens is None with a page_table; allowed: an int32 tensor"),
    (lambda: paged(page_table=torch.tensor([[0, 2]])), r"^page_table has dtype int64; allowed: int32"),
    (lambda: paged(q=half(2, 4, 64).requires_grad_()), r"^page_table is given with inputs that require gradients"),
    (lambda: paged(k=half(3, 2, 16, 64).transpose(1, 2)), r"^k has strides .*; allowed: contiguous"),
    (lambda: rms_norm(half(2, 8), half(9)), r"^weight has shape \[9\]; allowed: \[width\] = \[8\]"),
    (lambda: rms_norm(half(2, 40_000), half(40_000)), r"^the width of x is 40000; allowed: 1 to 32768"),
    (lambda: rms_norm(half(2, 8), half(8), eps=-1.0), r"^eps is -1.0; allowed: 0 or more"),
    (
        lambda: rms_norm(half(2, 8), half(8), residual=half(3, 8)),
        r"^residual has shape \[3, 8\]; allowed: x's shape",
    ),
    (
        lambda: rope(half(2, 4, 63), half(2, 2, 63), torch.zeros(9, 31), torch.zeros(9, 31), ints(0, 1)),
        r"^q has head size 63; allowed",
    ),
    (
        lambda: rope(half(2, 4, 64), half(2, 2, 64), torch.zeros(9, 31), torch.zeros(9, 31), ints(0, 1)),
        r"^cos has shape \[9, 31\]",
    ),
    (
        lambda: cached_rope(keys=half(9, 1, 64)),
        r"^cache.keys has shape \[9, 1, 64\]; allowed: \[any, kv_heads, D\] = \[9, 2, 64\]",
    ),
    (lambda: cached_rope(v=half(3, 2, 64)), r"^cache.v has shape \[3, 2, 64\]; allowed: k's shape"),
    (lambda: cached_rope(values=half(2, 9, 64).transpose(0, 1)), r"^cache.values\[0\] has strides"),
    (lambda: cached_rope(slots=half(2)), r"^cache.slots has dtype bfloat16; allowed: int32, int64"),
    (lambda: cached_rope(q=half(2, 4, 64).requires_grad_()), r"^cache is given with inputs that require gradients"),
    (lambda: swiglu(half(2, 7)), r"^x has shape \[2, 7\]; allowed: an even last dimension"),
    (lambda: embedding(half(2), half(4, 8)), r"^ids has dtype bfloat16; allowed: int32, int64"),
    (lambda: embedding(ints(1), half(4, 8), vocab_start=-1), r"^vocab_start is -1; allowed: 0 or more"),
    (lambda: log_prob(half(2, 32), ints(1, 2), temperature=0.0), r"^temperature is 0.0; allowed: a positive number"),
    (
        lambda: log_prob(half(2, 32), ints(1, 2), temperature=torch.ones(3)),
        r"^temperature has shape \[3\]; allowed: \[rows\] = \[2\]",
    ),
    (
        lambda: log_prob(half(2, 32), ints(1, 2), temperature=torch.ones(2).double()),
        r"^temperature has dtype float64; allowed: float32",
    ),
    (
        lambda: log_prob(half(2, 32).requires_grad_(), ints(1, 2), temperature=torch.ones(2)),
        r"^temperature is a tensor and logits require gradients; allowed: one number",
    ),
    (
        lambda: sample(half(2, 32), ints(1, 2).long(), ints(1, 2).long(), temperature=torch.ones(2), top_k=3),
        r"^temperature is a tensor with top_k or top_p; allowed: one number",
    ),
    (lambda: log_prob(half(2, 32), ints(1)), r"^targets has shape \[1\]; allowed: \[rows\] = \[2\]"),
    (
        lambda: log_prob(half(2, 30), ints(1, 2), vocab_size=64),
        r"^logits has 30 columns from 0 of vocab_size 64",
    ),
    (lambda: log_softmax(half(2, 32), out_dtype=torch.int32), r"^out_dtype has dtype int32; allowed: bfloat16"),
    (lambda: linear_log_prob(half(2, 8), half(32, 8), ints(1, 2), rows_at_once=0), r"^rows_at_once is 0; allowed: 1 or more"),
    (lambda: sample(half(2, 8), ints(1, 2), ints(1, 2)), r"^seeds has dtype int32; allowed: int64"),
    (
        lambda: sample(half(2, 8), ints(1, 2).long(), ints(1, 2).long(), top_p=0.0),
        r"^top_p is 0.0; allowed: above 0",
    ),
    (lambda: quantize_rows(half(2, 100)), r"^x has K = 100; allowed: a multiple of 128"),
    (lambda: quantize_weight(half(128)), r"^weight has shape \[128\]; allowed: \[N, K\] or \[experts, N, K\]"),
    (
        lambda: fp8_matmul(half(2, 128), torch.ones(2, 1), fp8(16, 128), torch.ones(1, 1)),
        r"^x has dtype bf.*: float8",
    ),
    (lambda: fp8_matmul(fp8(2, 128), torch.ones(2, 2), fp8(16, 128), torch.ones(1, 1)), r"^x_scale has shape \[2, 2\]"),
    (
        lambda: fp8_matmul(fp8(2, 128), torch.ones(2, 1), fp8(10, 128), torch.ones(1, 1)),
        r"^weight has N = 10; allowed",
    ),
    (
        lambda: fp8_grouped_matmul(fp8(2, 128), torch.ones(2, 1), fp8(1, 16, 128), torch.ones(1, 1, 1), ints(1, 1)),
        r"^counts has shape \[2\]; allowed: \[experts\] = \[1\]",
    ),
    (lambda: verify(device="cpu"), r"^device is 'cpu'; allowed: a CUDA device that is there"),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[1:40] for _, message in CASES])
def test_wrong_input_names_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
