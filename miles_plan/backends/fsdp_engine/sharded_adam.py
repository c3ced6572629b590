"""torch's AdamW over shards of float32 masters, with our schedule, clipping and skipping of non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_plan.backends.fsdp_engine.model import local
from miles_plan.backends.training.learning_rate import learning_rate
from miles_plan.ir.options import OptimizerOptions

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdam:
    """parameters: DTensors by name, tied ones once; their gradients are kept allocated and added to by backward.

    The optimizer knows this rank's shares only, as plain tensors on the memory of the DTensors; a share may be empty. On a GPU
    it is torch's fused kernel, which needs no memory of its own.
    """

    def __init__(self, parameters: Mapping[str, Any], device: str) -> None:
        self.parameters = dict(parameters)
        self.device = device
        self.steps_taken = 0
        self._shares: dict[str, torch.nn.Parameter] = {}
        self._moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            parameter.grad = torch.zeros_like(parameter)
            self._shares[name] = torch.nn.Parameter(local(parameter))
            self._moments[name] = {moment: torch.zeros_like(local(parameter)) for moment in _MOMENTS}
        held = {name: share for name, share in self._shares.items() if share.numel()}
        groups = [
            {"params": [share for share in held.values() if (share.dim() > 1) == decayed], "decayed": decayed}
            for decayed in (True, False)
        ]
        wanted: Any = [group for group in groups if group["params"]]
        self._adam = torch.optim.AdamW(wanted, lr=0.0, fused=device == "cuda", foreach=device != "cuda")
        for name, share in held.items():
            step = torch.zeros((), dtype=torch.float32, device=device if device == "cuda" else "cpu")
            self._adam.state[share] = {"step": step, **self._moments[name]}

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        torch._foreach_zero_(self.gradients())

    def step(self, options: OptimizerOptions) -> dict[str, float]:
        """Clip by the global norm and update. A norm that is not finite skips the update on all ranks.

        Metrics: grad_norm (before clipping), learning_rate (of this step), skipped_steps (1.0 or 0.0).
        """
        norm = self._global_norm()
        if not math.isfinite(norm):
            return self.skip(options, norm)
        rate = learning_rate(options, self.steps_taken)
        self.steps_taken += 1
        if options.clip_grad_norm and (scale := options.clip_grad_norm / (norm + 1e-6)) < 1.0:
            torch._foreach_mul_(self.gradients(), scale)
        for share, gradient in zip(self._shares.values(), self.gradients(), strict=True):
            share.grad = gradient
        for group in self._adam.param_groups:
            group["lr"], group["eps"] = rate, options.epsilon
            group["betas"] = (options.beta1, options.beta2)
            group["weight_decay"] = options.weight_decay if group["decayed"] else 0.0
        self._adam.step()
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": 0.0}

    def skip(self, options: OptimizerOptions, norm: float = 0.0) -> dict[str, float]:
        """The metrics of a step that changes nothing."""
        return {"grad_norm": norm, "learning_rate": learning_rate(options, self.steps_taken), "skipped_steps": 1.0}

    def gradients(self) -> list[Tensor]:
        """This rank's shares of the gradients."""
        return [local(parameter.grad) for parameter in self.parameters.values()]

    def moments(self) -> dict[str, Tensor]:
        """This rank's shares of the moments by name; the tensors themselves."""
        return {f"{name}/{moment}": tensor for name, own in self._moments.items() for moment, tensor in own.items()}

    def step_counts(self) -> Tensor:
        """steps_taken: every parameter has been updated as often."""
        return torch.tensor(self.steps_taken)

    def restore(self, found: Mapping[str, Tensor], steps_taken: int) -> None:
        """Take back what `moments` and `step_counts` gave."""
        for name, moment in self.moments().items():
            moment.copy_(found[name])
        self.steps_taken = steps_taken
        for state in self._adam.state.values():
            state["step"].fill_(float(steps_taken))

    def _global_norm(self) -> float:
        """Every element lies on exactly one rank."""
        held = [gradient for gradient in self.gradients() if gradient.numel()]
        norms = (
            torch.stack(torch._foreach_norm(held, 2.0, dtype=torch.float64)) if held else torch.zeros(1, dtype=torch.float64)
        )
        squares = norms.to(self.device).square().sum()
        dist.all_reduce(squares)
        total = float(squares)
        return math.sqrt(total) if math.isfinite(total) else total
