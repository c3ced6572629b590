from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles_plan.algorithms.aggregation import token_weights
from miles_plan.algorithms.policy_loss import PolicyTargets, clipped_surrogate, kl_estimate, policy_loss
from miles_plan.algorithms.sft_loss import sft_loss
from miles_plan.ir.options import LossOptions

PLAIN = LossOptions(kind="policy_gradient")


def surrogate(ratio, advantage, **options):
    value, clipped = clipped_surrogate(
        torch.log(torch.tensor([ratio], dtype=torch.float64)),
        torch.tensor([advantage], dtype=torch.float64),
        replace(PLAIN, **options),
    )
    return value.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "expected"),
    [
        (1.1, 2.0, {}, (-2.2, 0.0)),
        (1.5, 2.0, {}, (-2.4, 1.0)),  # a gain is capped at 1 + 0.2
        (1.25, 2.0, {"clip_high": 0.28}, (-2.5, 0.0)),  # clip-higher leaves it room
        (0.5, 2.0, {}, (-1.0, 0.0)),  # a loss of a good token is never clipped away
        (0.5, -2.0, {}, (1.6, 1.0)),
        (5.0, -2.0, {}, (10.0, 0.0)),
        (5.0, -2.0, {"dual_clip": 3.0}, (6.0, 1.0)),  # dual clip bounds it at 3 x 2
        (1.1, -2.0, {"dual_clip": 3.0}, (2.2, 0.0)),
        (0.5, 2.0, {"dual_clip": 3.0}, (-1.0, 0.0)),  # and leaves positive advantages alone
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, options, expected):
    assert surrogate(ratio, advantage, **options) == pytest.approx(expected)


def test_kl_estimators_by_hand():
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_estimate(policy, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(policy, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(np.exp(-0.5) - 1 + 0.5)


def test_kl_estimators_average_to_the_true_kl():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(8, generator=draw, dtype=torch.float64), 0) for _ in range(2))
    true = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * kl_estimate(p, q, "k1")).sum().item() == pytest.approx(true)
    assert (p.exp() * kl_estimate(p, q, "k3")).sum().item() == pytest.approx(true)


def targets_of(batch, options, dtype=torch.float64):
    columns = {name: torch.tensor(values, dtype=dtype) for name, values in batch.columns.items()}
    weights = token_weights(batch, options.aggregation, constant=options.aggregation_constant)
    return PolicyTargets(
        old_log_probs=columns["old_log_probs"],
        advantages=columns["advantage"],
        weights=torch.tensor(weights, dtype=dtype),
        response_length=torch.tensor(batch.response_length, dtype=torch.int64),
        num_tokens=int(columns.get("loss_mask", torch.ones(len(columns["advantage"]))).sum()),
        reference_log_probs=columns.get("reference_log_probs"),
        importance_weights=columns.get("importance_weight"),
    )


@pytest.fixture
def batch(make_batch):
    draw = np.random.default_rng(0)
    return make_batch(
        [0, 0, 1, 1],
        [3, 1, 0, 4],
        advantage=draw.normal(size=8),
        old_log_probs=draw.normal(size=8) - 2.0,
        reference_log_probs=draw.normal(size=8) - 2.0,
        importance_weight=draw.uniform(0.5, 2.0, size=8),
        loss_mask=np.array([1, 1, 0, 1, 1, 1, 1, 0]),
    )


OPTIONS = [
    replace(PLAIN, clip_high=0.28, kl_coef=0.1, entropy_coef=0.01),
    replace(PLAIN, ratio_level="sequence", aggregation="sequence_mean", clip_low=0.5, clip_high=0.5),
    replace(PLAIN, aggregation="prompt_mean", dual_clip=3.0, kl_coef=0.3, kl_estimator="k2"),
    replace(PLAIN, aggregation="constant", aggregation_constant=16.0, kl_coef=0.2, kl_estimator="k1"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_finite_differences(batch, options):
    targets = targets_of(batch, options)
    draw = torch.Generator().manual_seed(1)
    log_probs = (targets.old_log_probs + 0.3 * torch.randn(8, generator=draw, dtype=torch.float64)).requires_grad_()
    entropy = torch.rand(8, generator=draw, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda lp, h: policy_loss(lp, targets, options, entropy=h)[0], (log_probs, entropy))


@pytest.mark.parametrize("options", OPTIONS)
def test_micro_batches_add_up_to_the_whole_batch(batch, options):
    draw = torch.Generator().manual_seed(2)
    log_probs = torch.tensor(batch.columns["old_log_probs"]) + 0.3 * torch.randn(8, generator=draw, dtype=torch.float64)
    whole = targets_of(batch, options)
    entropy = torch.ones(8, dtype=torch.float64)
    loss, metrics = policy_loss(log_probs, whole, options, entropy=entropy)
    parts = []
    for samples, tokens in (([0, 1], slice(0, 4)), ([2, 3], slice(4, 8))):
        part = replace(
            whole,
            **{
                name: getattr(whole, name)[tokens]
                for name in ("old_log_probs", "advantages", "weights", "reference_log_probs", "importance_weights")
            },
            response_length=whole.response_length[samples],
        )
        parts.append(policy_loss(log_probs[tokens], part, options, entropy=entropy[tokens]))
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item())
    for name, value in metrics.items():
        assert sum(part[1][name].item() for part in parts) == pytest.approx(value.item()), name


def test_sequence_ratio_is_the_geometric_mean_over_counted_tokens(batch):
    options = OPTIONS[1]
    targets = replace(targets_of(batch, options), importance_weights=None)
    log_probs = targets.old_log_probs + torch.tensor([0.1, 0.3, 9.0, 0.2, 0.0, 0.1, 0.2, 9.0])
    _, metrics = policy_loss(log_probs, targets, options)
    ratios = np.exp([0.2, 0.2, 0.2, 0.1, 0.1, 0.1])
    assert metrics["ratio_mean"].item() == pytest.approx(ratios.mean())


def test_masked_tokens_get_no_gradient(batch):
    options = OPTIONS[0]
    targets = targets_of(batch, options)
    log_probs = targets.old_log_probs.clone().requires_grad_()
    policy_loss(log_probs, targets, options, entropy=torch.zeros(8, dtype=torch.float64))[0].backward()
    assert log_probs.grad is not None
    assert (log_probs.grad[[2, 7]] == 0).all()
    assert (log_probs.grad[[0, 1, 3, 4, 5, 6]] != 0).all()


def test_first_step_ratio_is_one_and_loss_is_minus_the_mean_advantage(batch):
    targets = replace(targets_of(batch, PLAIN), importance_weights=None)
    loss, metrics = policy_loss(targets.old_log_probs, targets, PLAIN)
    counted = batch.columns["loss_mask"] > 0
    assert loss.item() == pytest.approx(-batch.columns["advantage"][counted].mean())
    assert metrics["ratio_mean"].item() == pytest.approx(1.0)
    assert metrics["clip_fraction"].item() == 0.0


def test_an_empty_micro_batch_costs_nothing(batch):
    targets = targets_of(batch, OPTIONS[1])
    none = replace(
        targets,
        **{name: torch.zeros(0) for name in ("old_log_probs", "advantages", "weights")},
        response_length=torch.zeros(0, dtype=torch.int64),
        importance_weights=None,
    )
    loss, _ = policy_loss(torch.zeros(0, requires_grad=True), none, OPTIONS[1])
    assert loss.item() == 0.0


def test_the_penalty_is_added_and_the_bonus_taken_away(batch):
    options = replace(PLAIN, kl_coef=0.5, kl_estimator="k1", entropy_coef=0.25)
    targets = targets_of(batch, options)
    entropy = torch.arange(8.0, dtype=torch.float64)
    plain, _ = policy_loss(targets.old_log_probs, targets, PLAIN)
    full, metrics = policy_loss(targets.old_log_probs, targets, options, entropy=entropy)
    counted = torch.tensor(batch.columns["loss_mask"]) > 0
    difference = (targets.old_log_probs - targets.reference_log_probs)[counted].mean()
    assert metrics["reference_kl"].item() == pytest.approx(difference.item(), rel=1e-6)
    assert full.item() == pytest.approx((plain + 0.5 * difference - 0.25 * entropy[counted].mean()).item(), rel=1e-6)


def test_missing_targets_are_refused(batch):
    targets = replace(targets_of(batch, PLAIN), reference_log_probs=None)
    with pytest.raises(ValueError, match="needs the reference"):
        policy_loss(targets.old_log_probs, targets, replace(PLAIN, kl_coef=0.1))
    with pytest.raises(ValueError, match="needs the entropy"):
        policy_loss(targets.old_log_probs, targets, replace(PLAIN, entropy_coef=0.1))


def test_extreme_ratios_stay_finite(batch):
    options = replace(PLAIN, kl_coef=0.1)
    targets = targets_of(batch, options, torch.float32)
    log_probs = (targets.old_log_probs + 200.0).requires_grad_()
    loss, _ = policy_loss(log_probs, replace(targets, reference_log_probs=log_probs.detach() + 200.0), options)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_probs.grad).all()


def test_sft_loss_is_the_mean_negative_log_likelihood(make_batch):
    batch = make_batch([0, 1], [2, 1])
    weights = torch.tensor(token_weights(batch, "token_mean"))
    log_probs = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    loss, metrics = sft_loss(log_probs, weights)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)
    assert metrics["loss"].item() == pytest.approx(3.0)
    torch.testing.assert_close(log_probs.grad, -weights)
