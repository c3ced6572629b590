"""Megatron's optimizer as the engine uses it: options that change from step to step, non-finite gradients skipped, all state
reachable as tensors to save, restore and park."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from miles_plan.backends.megatron_engine.arguments import MegatronArguments
from miles_plan.backends.training.learning_rate import learning_rate
from miles_plan.ir.options import OptimizerOptions


class PolicyOptimizer:
    """Adam with float32 masters over Megatron's DDP buffers (its distributed optimizer on a GPU)."""

    def __init__(self, arguments: MegatronArguments, chunks: list[torch.nn.Module]) -> None:
        """`chunks` are wrapped in Megatron's DistributedDataParallel and hold the initial weights."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        precision = arguments.precision
        config = OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            bf16=precision.bf16,
            params_dtype=getattr(torch, precision.params_dtype),
            use_distributed_optimizer=arguments.data_parallel.use_distributed_optimizer,
        )
        self.chunks = chunks
        self.steps_taken = 0
        self._optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
        self._make_moments()

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]  # DistributedDataParallel's
        self._optimizer.zero_grad()

    def step(self, options: OptimizerOptions) -> dict[str, float]:
        """Clip by the global norm and update; gradients are already summed over all replicas.

        A norm that is not finite skips the update on all ranks. Metrics: grad_norm (before clipping), learning_rate (of this
        step), skipped_steps (1.0 or 0.0).
        """
        optimizer = self._optimizer
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return self.skip(options, norm)
        rate = learning_rate(options, self.steps_taken)
        self.steps_taken += 1
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = options.weight_decay * group.get("wd_mult", 1.0)
            group["betas"], group["eps"] = (options.beta1, options.beta2), options.epsilon
        if options.clip_grad_norm and (scale := options.clip_grad_norm / (norm + 1e-6)) < 1.0:
            for parameter in optimizer.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        optimizer.step_with_ready_grads()
        return {"grad_norm": norm, "learning_rate": rate, "skipped_steps": 0.0}

    def skip(self, options: OptimizerOptions, norm: float = 0.0) -> dict[str, float]:
        """The metrics of a step that changes nothing."""
        return {"grad_norm": norm, "learning_rate": learning_rate(options, self.steps_taken), "skipped_steps": 1.0}

    def gradients(self) -> list[Tensor]:
        """The float32 buffers that backward adds to."""
        return [buffer.grad_data for buffer in self._buffers()]

    def tensors(self) -> dict[str, Tensor]:
        """Masters, moments and step counts of this rank by place; the tensors themselves. Masters that are the weights of a
        float32 model are among them."""
        found = {}
        for place, parameter, state in self._states():
            found[f"{place}/master"] = parameter
            found |= {f"{place}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        return found

    def step_counts(self) -> Tensor:
        """steps_taken, then the count that each parameter group keeps (Transformer Engine's Adam), int64."""
        groups = [int(group.get("step", 0)) for inner in self._inner() for group in inner.param_groups]
        return torch.tensor([self.steps_taken, *groups])

    def restore(self, found: Mapping[str, Tensor], counts: Tensor) -> None:
        """Take back what `tensors` and `step_counts` gave; moments that this optimizer had not made yet are made."""
        with torch.no_grad():
            for place, parameter, state in self._states():
                parameter.copy_(found[f"{place}/master"])
                state.clear()
                for name in (each for each in found if each.startswith(f"{place}/") and not each.endswith("/master")):
                    key = name.rpartition("/")[2]
                    device = "cpu" if found[name].dim() == 0 else parameter.device
                    state[key] = found[name].to(device).clone()
        self.steps_taken = int(counts[0])
        groups = [group for inner in self._inner() for group in inner.param_groups]
        for group, count in zip(groups, counts[1:].tolist(), strict=True):
            if count or "step" in group:
                group["step"] = count

    def _make_moments(self) -> None:
        """Moments from the start, and not at the first step: what is measured and parked before it is then the whole state."""
        for inner in self._inner():
            for parameter in (each for group in inner.param_groups for each in group["params"]):
                state = inner.state[parameter]
                state |= {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                if isinstance(inner, torch.optim.Adam):  # Transformer Engine's counts by group
                    state["step"] = torch.tensor(0.0)

    def _buffers(self) -> Iterator[Any]:
        for chunk in self.chunks:
            wrapped: Any = chunk
            yield from (*wrapped.buffers, *wrapped.expert_parallel_buffers)

    def _inner(self) -> Iterator[Any]:
        """torch's optimizers under Megatron's."""
        chained = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        yield from (each.optimizer for each in chained if each.optimizer is not None)

    def _states(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Place, master and mutable state of every parameter of this rank, in an order that only the layout decides."""
        for number, inner in enumerate(self._inner()):
            for index, group in enumerate(inner.param_groups):
                for position, parameter in enumerate(group["params"]):
                    yield f"{number}/{index}/{position}", parameter, inner.state[parameter]
