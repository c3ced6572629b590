"""The process that owns one SGLang engine, and answers its owner over a socket: one request, one answer.

SGLang's `Engine` takes the process it lives in for its own: signal handlers, event loop, start method, environment, and every
child on shutdown. The actor that holds a rank of a trainer too could not bear that. The owner's death is the socket's end of
file; then this process and its schedulers end.

A process can be started before its engine may touch a GPU: it imports SGLang, waits for the model to be there, and starts
schedulers that import theirs and then wait for their turn. That takes as long as the rest of an engine's start.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from miles_plan.backends.sglang_engine.generation import Responses, Routed, responses

ABORT, CLOSE = "abort", "close"
KERNELS_SWITCH = "MILES_PLAN_SGLANG_KERNELS"
KERNEL_HOOKS = "miles_plan.kernels.cuda.hooks_sglang"
TURN = "MILES_PLAN_SGLANG_TURN"  # names a file that appears when the schedulers may touch their GPUs
_POLL_S = 0.02


def engine_class() -> Any:
    """SGLang's Engine; its schedulers run on this package's kernels, and wait for their turn, where the environment says so."""
    from sglang.srt.entrypoints.engine import Engine  # `sglang.Engine` is a proxy, which no class can derive from

    with_kernels = os.environ.get(KERNELS_SWITCH) == "1"
    if with_kernels:
        take_kernels()
    elif not os.environ.get(TURN):
        return Engine
    return type("Engine", (Engine,), {"run_scheduler_process_func": staticmethod(run_scheduler)})


def run_scheduler(*arguments: Any) -> None:
    """What each scheduler's process runs: it has its turn, and the kernels are in place, before it loads the model."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    if os.environ.get(KERNELS_SWITCH) == "1":
        take_kernels()
    _wait_for_turn()
    run_scheduler_process(*arguments)


def _wait_for_turn() -> None:
    """Return when the file that `TURN` names is there; end where the process that started this one is gone."""
    turn, parent = os.environ.get(TURN), os.getppid()
    while turn and not os.path.exists(turn):
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(_POLL_S)


def take_kernels() -> None:
    """Register this package's backends in this process, unless SGLang has found them itself as an installed plugin."""
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    if not any(each.value.startswith(KERNEL_HOOKS) for each in entry_points(group=GENERAL_PLUGINS_GROUP)):
        import_module(KERNEL_HOOKS).plugin()
        HookRegistry.apply_hooks()


class EngineServer:
    """Answers requests with an engine; methods that requests may name are those without an underscore."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Start the engine. Raises what SGLang raises."""
        self._engine = engine_class()(**arguments)
        self._routed: Routed | None = None

    def info(self) -> dict[str, Any]:
        """The engine's effective configuration and state."""
        found: dict[str, Any] = self._engine.get_server_info()
        return found

    def generate(
        self, prompts: list[list[int]], sampling: list[dict[str, Any]], routed: Routed | None
    ) -> tuple[Responses, float]:
        """Responses in columns, in the order of the prompts, and the seconds that SGLang took for them."""
        began = time.perf_counter()
        outputs = self._engine.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True, return_routed_experts=routed is not None
        )
        seconds = time.perf_counter() - began
        return responses(outputs, routed), seconds

    def take(self, payloads: list[bytes], receiver: str, flush: bool) -> str:
        """Hand a bucket to the schedulers' loader, one payload a rank; returns SGLang's message, empty when all went well."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads, load_format=receiver, flush_cache=flush)
        done, message = self._wait(self._engine.tokenizer_manager.update_weights_from_tensor(request, None))
        return "" if done else message

    def join(self, address: str, port: int, rank_offset: int, world_size: int, name: str) -> str:
        """Join a process group as its receivers; returns SGLang's message, empty when all went well."""
        done, message = self._engine.init_weights_update_group(address, port, rank_offset, world_size, name, "nccl")
        return "" if done else message

    def receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str, flush: bool) -> str:
        """Take a bucket that the group's sender broadcasts; returns SGLang's message, empty when all went well."""
        done, message = self._engine.update_weights_from_distributed(
            names, dtypes, shapes, group_name=group, flush_cache=flush, load_format="flattened_bucket"
        )
        return "" if done else message

    def sleep(self, tags: list[str]) -> None:
        """Give the memory of these tags back."""
        self._engine.release_memory_occupation(tags)

    def wake(self, tags: list[str]) -> None:
        """Take the memory of these tags again."""
        self._engine.resume_memory_occupation(tags)

    def _abort(self) -> None:
        """End every request that runs; called from another thread than `generate`."""
        self._engine.loop.call_soon_threadsafe(self._engine.tokenizer_manager.abort_request, "", True)

    def _wait(self, awaitable: Any) -> Any:
        return self._engine.loop.run_until_complete(awaitable)


def serve(connection: Connection) -> None:
    """Read the arguments, start the engine, answer until told to close or until the owner is gone.

    With the arguments comes a file that must be there before the engine is made, None where it is there.
    """
    began = time.perf_counter()
    arguments, needed = connection.recv()
    server: EngineServer | None = None
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                request = connection.recv()
            except (EOFError, OSError):
                _end()
            if request[0] == ABORT:
                if server is not None:
                    server._abort()
            elif request[0] == CLOSE:
                _end()
            else:
                requests.put(request)

    threading.Thread(target=listen, daemon=True).start()
    try:
        engine_class()
        imported_s = time.perf_counter() - began
        while needed is not None and not Path(needed).exists():
            time.sleep(_POLL_S)
        server = EngineServer(arguments)
        connection.send((True, (server.info(), imported_s)))
    except BaseException as error:
        connection.send((False, _described(error)))
        _end()
    while True:
        method, given = requests.get()
        try:
            connection.send((True, getattr(server, method)(**given)))
        except Exception as error:
            connection.send((False, _described(error)))


def _described(error: BaseException) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _end() -> None:
    """This process and all it has started, at once: schedulers hold GPU memory for as long as they live."""
    sys.stderr.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
