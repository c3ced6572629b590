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
    """parameters: DTensors by name, tied ones once; their gradients are kept allocated and added to by backward."""

    def __init__(self, parameters: Mapping[str, Any], device: str) -> None:
        self.parameters = dict(parameters)
        self.device = device
        self.steps_taken = 0
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        groups = [
            {"params": [each for each in self.parameters.values() if (each.dim() > 1) == decayed], "decayed": decayed}
            for decayed in (True, False)
        ]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, foreach=True)
        for parameter in self.parameters.values():
            state = self._adam.state[parameter]
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter) for name in _MOMENTS}

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        for gradient in self.gradients():
            gradient.zero_()

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
            for gradient in self.gradients():
                gradient.mul_(scale)
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
        return {
            f"{name}/{moment}": local(self._adam.state[parameter][moment])
            for name, parameter in self.parameters.items()
            for moment in _MOMENTS
        }

    def step_counts(self) -> Tensor:
        """steps_taken: every parameter has been updated as often."""
        return torch.tensor(self.steps_taken)

    def restore(self, found: Mapping[str, Tensor], steps_taken: int) -> None:
        """Take back what `moments` and `step_counts` gave."""
        for name, moment in self.moments().items():
            moment.copy_(found[name])
        self.steps_taken = steps_taken
        for parameter in self.parameters.values():
            self._adam.state[parameter]["step"] = torch.tensor(float(steps_taken))

    def _global_norm(self) -> float:
        """Every element lies on exactly one rank."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in self.gradients():
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        dist.all_reduce(squares)
        total = float(squares)
        return math.sqrt(total) if math.isfinite(total) else total
