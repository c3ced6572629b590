"""What `engine_process` calls of SGLang, without a GPU: the process, its socket and its end are real, the model is a counter.

Generated tokens are the prompt's last token plus 1, 2, ..., modulo 12; their log-probs are minus the one parameter's value.
"""

from __future__ import annotations

import asyncio
import os
import time
from importlib import import_module
from typing import Any

import torch


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameters[name].copy_(tensor)


class _TokenizerManager:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def update_weights_from_tensor(self, request: Any, _: Any) -> tuple[bool, str]:
        module, _, name = request.load_format.rpartition(".")
        for payload in request.serialized_named_tensors:
            import pickle

            getattr(import_module(module), name)(self.engine.model, pickle.loads(payload))
        return True, "Success"

    def abort_request(self, rid: str, abort_all: bool) -> None:
        self.engine.aborted = abort_all


class Engine:
    def __init__(self, **arguments: Any) -> None:
        if arguments["model_path"] == "broken":
            raise RuntimeError("Not enough memory. Please try to increase --mem-fraction-static.")
        self.arguments, self.model, self.aborted = arguments, _Model(), False
        self.loop = asyncio.new_event_loop()
        self.tokenizer_manager = _TokenizerManager(self)
        self.asleep: list[str] = []

    def get_server_info(self) -> dict[str, Any]:
        state = {
            **self.arguments,
            "chunked_prefill_size": self.arguments["chunked_prefill_size"] // self.arguments["dp_size"],
            "effective_max_running_requests_per_dp": self.arguments["max_running_requests"] // self.arguments["dp_size"],
            "memory_usage": {
                "weight": 1.0,
                "kvcache": 2.0,
                "graph": 0.5,
                "token_capacity": self.arguments["max_total_tokens"],
            },
            "cuda_graph_config": {
                "decode": {"backend": "full", "max_bs": self.arguments["cuda_graph_max_bs_decode"]},
                "prefill": {"backend": "disabled"},
            },
        }
        if self.arguments["model_path"] == "other":
            state["page_size"] = 1
        return {"version": "0.5.16", "internal_states": [state]}

    def generate(self, *, input_ids: list[list[int]], sampling_params: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        if input_ids[0][0] == 13:
            os.kill(os.getpid(), 9)
        if input_ids[0][0] == 14:
            self.loop.run_until_complete(self._until_aborted())
        outputs = []
        score = -float(self.model.norm.weight[0])
        for prompt, sampling in zip(input_ids, sampling_params, strict=True):
            tokens = [(prompt[-1] + 1 + at) % 12 for at in range(sampling["max_new_tokens"])]
            reason = {"type": "abort", "message": "Aborted"} if self.aborted else {"type": "length"}
            meta = {"prompt_tokens": len(prompt), "finish_reason": reason}
            meta["output_token_logprobs"] = [(score, token, None) for token in tokens]
            outputs.append({"output_ids": tokens, "meta_info": meta})
        return outputs

    async def _until_aborted(self) -> None:
        ends = time.monotonic() + 20.0
        while not self.aborted and time.monotonic() < ends:
            await asyncio.sleep(0.01)

    def release_memory_occupation(self, tags: list[str]) -> None:
        self.asleep += tags

    def resume_memory_occupation(self, tags: list[str]) -> None:
        self.asleep = [tag for tag in self.asleep if tag not in tags]
