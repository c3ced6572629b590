"""One SGLang engine on one GPU, through our engine: start, generate, weights by CUDA IPC, sleep, speed, death.

    python -m benchmarks.engines.sglang_bringup PLAN OUT.json [--model FOLDER]

PLAN is a compiled plan whose rollout group runs on SGLang; the model is of the plan's shape, with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engines import random_model
from miles_plan.backends.engine import EngineError, Request, WeightBucket, WeightTensor
from miles_plan.backends.executor.device_memory import device_memory
from miles_plan.backends.sglang_engine import rollout_engine
from miles_plan.backends.sglang_engine.engine_link import EngineLink
from miles_plan.backends.sglang_engine.placed_weights import can_probe, probes_of
from miles_plan.backends.sglang_engine.read_back import differences, effective
from miles_plan.backends.sglang_engine.rollout_engine import SglangOptions, SglangRolloutEngine
from miles_plan.backends.sglang_engine.server_arguments import server_arguments
from miles_plan.backends.weight_transport.cuda_ipc import checksums, lend
from miles_plan.ir.options import SamplingOptions
from miles_plan.ir.plan import Plan, read_plan

GIB = 1 << 30
BUCKET_BYTES = 512 << 20


class Bringup:
    """Steps share an engine and the trainer's side of the weights; each writes its figures into `results`."""

    def __init__(self, plan: Plan, model: Path, log: Path) -> None:
        self.plan, self.model, self.log = plan, model, log
        self.gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.results: dict[str, Any] = {"device_used_before_gib": self.used()}
        self.engine: SglangRolloutEngine | None = None
        self.state: dict[str, torch.Tensor] = {}

    def used(self) -> float:
        return device_memory(self.gpu).used_bytes / GIB

    def start(self) -> dict[str, Any]:
        group = next(each for each in self.plan.graph.groups if each.role == "rollout")
        arguments = server_arguments(self.plan, group, model_directory=self.model)
        found: list[str] = []

        def check(asked: Any, info: Any) -> Any:
            found.extend(differences(asked, info))
            return effective(info)

        rollout_engine.check = check  # a difference is reported here, not fatal
        rollout_engine.EngineLink = lambda *a, **k: EngineLink(*a, module="benchmarks.engines.timed_process", **k)
        before = self.used()
        config = dict(self.plan.run.model.hf_config or {})
        options = SglangOptions(
            arguments=arguments,
            gpus=(self.gpu,),
            log=self.log,
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
        )
        self.engine = SglangRolloutEngine(options)
        facts = self.engine.effective
        return {
            "arguments": arguments.as_mapping(),
            "seconds": self.engine.started_s,
            "differences": found,
            "effective": {name: getattr(facts, name) for name in facts.__dataclass_fields__},
            "device_used_gib": self.used() - before,
        }

    def requests(self, prompts: int, samples: int, tokens: int) -> list[Request]:
        rng = np.random.default_rng(0)
        drawn = [tuple(int(token) for token in rng.integers(0, 256, tokens)) for _ in range(prompts)]
        return [
            Request(sample_id=number * samples + again, prompt_id=number, prompt=prompt)
            for number, prompt in enumerate(drawn)
            for again in range(samples)
        ]

    def first_generate(self) -> dict[str, Any]:
        began = time.perf_counter()
        options = SamplingOptions(max_response_tokens=16, temperature=0.7)
        batch = self.engine.generate(self.requests(4, 2, 12), options, min_version=0)
        return {"seconds": time.perf_counter() - began, **self.compared(batch, 0.7)}

    def compared(self, batch: Any, temperature: float) -> dict[str, Any]:
        """Rollout log-probs against a plain forward pass of transformers in bf16 with the weights we hold."""
        model = random_model.reference(self.model, self.state)
        worst, total, count = 0.0, 0.0, 0
        for index in range(batch.num_samples):
            tokens = torch.from_numpy(batch.sequence(index).astype(np.int64)).cuda()
            prompt = int(batch.prompt_length[index])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, prompt - 1 : -1].float() / temperature
            own = torch.log_softmax(logits, -1).gather(1, tokens[prompt:, None])[:, 0].cpu().numpy()
            start = int(batch.response_start[index])
            differs = np.abs(own - batch.rollout_log_probs[start : start + len(own)])
            worst, total, count = max(worst, float(differs.max())), total + float(differs.sum()), count + len(own)
        return {"tokens": count, "max_abs_log_prob_diff": worst, "mean_abs_log_prob_diff": total / max(count, 1)}

    def buckets(self, version: int) -> Iterator[tuple[WeightBucket, torch.Tensor]]:
        names, groups, filled = list(self.state), [[]], 0
        for name in names:
            size = self.state[name].numel() * 2
            if groups[-1] and filled + size > BUCKET_BYTES:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        for index, group in enumerate(groups):
            sizes = [-(-self.state[name].numel() * 2 // 64) * 64 for name in group]
            flat, tensors, offset = torch.empty(sum(sizes), dtype=torch.uint8, device="cuda"), [], 0
            for name, size in zip(group, sizes, strict=True):
                own = self.state[name].numel() * 2
                flat[offset : offset + own].copy_(self.state[name].reshape(-1).view(torch.uint8))
                tensors.append(
                    WeightTensor(
                        name=name,
                        shape=tuple(self.state[name].shape),
                        dtype="bfloat16",
                        offset_bytes=offset,
                        size_bytes=own,
                        checksum="",
                    )
                )
                offset += size
            sums = checksums(flat, tensors)
            described = tuple(
                WeightTensor(**{**{f: getattr(t, f) for f in t.__dataclass_fields__}, "checksum": s})
                for t, s in zip(tensors, sums, strict=True)
            )
            torch.cuda.synchronize()
            yield (
                WeightBucket(
                    transport="cuda_ipc",
                    version=version,
                    index=index,
                    handle=lend(flat),
                    tensors=described,
                    last=index == len(groups) - 1,
                ),
                flat,
            )

    def change(self) -> None:
        generator = torch.Generator(device="cuda").manual_seed(7)
        for tensor in self.state.values():
            noise = torch.randn(tensor.shape, generator=generator, device="cuda", dtype=torch.float32)
            tensor += (noise * 0.01).to(tensor.dtype)

    def sync(self, version: int) -> dict[str, Any]:
        began = time.perf_counter()
        sent = count = 0
        for bucket, flat in self.buckets(version):
            self.engine.update_weights(bucket)
            sent, count = sent + flat.numel(), count + 1
        self.engine.commit_weights(version)
        seconds = time.perf_counter() - began
        drawn = torch.Generator().manual_seed(version)
        probes = [each for name in self.state if can_probe(name) for each in probes_of(name, self.state[name], 2, drawn)]
        wrong = self.engine.probe(probes)
        return {
            "seconds": seconds,
            "buckets": count,
            "bytes": sent,
            "gb_per_s": sent / seconds / 1e9,
            "probes": len(probes),
            "probes_wrong": len(wrong),
            "wrong": wrong[:4],
        }

    def update(self) -> dict[str, Any]:
        self.state = random_model.weights(self.model)
        self.change()
        first = self.sync(1)
        self.change()
        again = self.sync(2)
        options = SamplingOptions(max_response_tokens=16, temperature=1.0)
        batch = self.engine.generate(self.requests(4, 2, 12), options, min_version=2)
        versions = sorted(set(batch.weight_version.tolist()))
        return {"first": first, "again": again, "versions": versions, **self.compared(batch, 1.0)}

    def refused(self) -> dict[str, Any]:
        """A bucket whose bytes are not those described, and a version that is not there."""
        bucket, flat = next(self.buckets(3))
        flat[1000] ^= 1
        said = []
        for call in (
            lambda: self.engine.update_weights(bucket),
            lambda: self.engine.generate(self.requests(1, 1, 4), SamplingOptions(max_response_tokens=2), min_version=2),
            lambda: self.engine.commit_weights(3),
        ):
            try:
                call()
                said.append("NOT REFUSED")
            except EngineError as error:
                said.append(str(error)[:200])
        return {"said": said, "after": self.sync(4)}

    def sleeping(self) -> dict[str, Any]:
        awake = self.used()
        out: dict[str, Any] = {"awake_gib": awake}
        for name, act in (
            ("sleep kv_cache, weights", lambda: self.engine.sleep(("kv_cache", "weights"))),
            ("wake weights", lambda: self.engine.wake(("weights",))),
            ("sync", lambda: self.sync(5)),
            ("wake kv_cache", lambda: self.engine.wake(("kv_cache",))),
        ):
            began = time.perf_counter()
            act()
            out[name] = {"seconds": time.perf_counter() - began, "device_used_gib": self.used()}
        options = SamplingOptions(max_response_tokens=16)
        out |= self.compared(self.engine.generate(self.requests(4, 2, 12), options, min_version=5), 1.0)
        return out

    def speed(self) -> dict[str, Any]:
        requests = self.requests(64, 8, 64)
        options = SamplingOptions(max_response_tokens=128)
        sampling = {"max_new_tokens": 128, "temperature": 1.0, "ignore_eos": True}
        prompts = [list(each.prompt) for each in requests]
        link = self.engine._link
        rounds = []
        for _ in range(3):
            plain = link.call("own_loop", prompts=prompts, sampling=sampling, return_logprob=False)
            scored = link.call("own_loop", prompts=prompts, sampling=sampling, return_logprob=True)
            began = time.perf_counter()
            batch = self.engine.generate(requests, options, min_version=0)
            ours = time.perf_counter() - began, len(batch.rollout_log_probs)
            rounds.append({"own": plain[1] / plain[0], "own_log_probs": scored[1] / scored[0], "ours": ours[1] / ours[0]})
        best = {name: max(each[name] for each in rounds) for name in rounds[0]}
        return {"tokens_per_s": rounds, "best": best, "ours_over_own": best["ours"] / best["own"],
                "ours_over_own_log_probs": best["ours"] / best["own_log_probs"]}  # fmt: skip

    def death(self) -> dict[str, Any]:
        children = self.engine._link.call("children")
        os.kill(children[0], signal.SIGKILL)
        began = time.perf_counter()
        try:
            self.engine.generate(self.requests(1, 1, 4), SamplingOptions(max_response_tokens=2), min_version=0)
            said = "NOT NOTICED"
        except EngineError as error:
            said = str(error)[:400]
        seconds = time.perf_counter() - began
        self.engine.close()
        return {"said": said, "seconds": seconds, "device_used_gib": self.used()}


def main() -> None:
    """Run every step, whatever the others gave, and write what each found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "model")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "sglang.log")
    args = parser.parse_args()
    plan = read_plan(args.plan)
    made = random_model.make(plan, args.model)
    run = Bringup(plan, args.model, args.log)
    run.results["model_made_s"] = made
    run.results["hardware"] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    steps: list[Callable[[], dict[str, Any]]] = [
        run.start, run.first_generate, run.update, run.refused, run.sleeping, run.speed, run.death,
    ]  # fmt: skip
    try:
        for step in steps:
            began = time.perf_counter()
            try:
                run.results[step.__name__] = step()
            except Exception as error:
                traceback.print_exc()
                run.results[step.__name__] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(
                step.__name__, f"{time.perf_counter() - began:.1f} s", json.dumps(run.results[step.__name__])[:1500], flush=True
            )
            args.out.write_text(json.dumps(run.results, indent=1))
            if run.engine is None:
                break
    finally:
        if run.engine is not None:
            run.engine.close()


if __name__ == "__main__":
    main()
