"""An engine process that can also time SGLang's own loop, to tell what the way through the link costs."""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from miles_plan.backends.sglang_engine import engine_process


class TimedServer(engine_process.EngineServer):
    """Answers two requests more."""

    def own_loop(self, prompts: list[list[int]], sampling: dict[str, Any], return_logprob: bool) -> tuple[float, int]:
        """Seconds and response tokens of `Engine.generate` alone, as sglang.bench_offline_throughput calls it."""
        began = time.perf_counter()
        outputs = self._engine.generate(
            input_ids=prompts, sampling_params=[dict(sampling) for _ in prompts], return_logprob=return_logprob
        )
        return time.perf_counter() - began, sum(each["meta_info"]["completion_tokens"] for each in outputs)

    def children(self) -> list[int]:
        """Process ids of schedulers and detokenizer."""
        return list(self._engine.get_all_child_pids())


if __name__ == "__main__":
    engine_process.EngineServer = TimedServer  # type: ignore[misc]
    engine_process.serve(Connection(int(sys.argv[1])))
