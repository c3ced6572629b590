"""Where the environment asks for this package's kernels, SGLang's processes take them before they load a model."""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from miles_plan.backends.sglang_engine import engine_process
from miles_plan.backends.sglang_engine.engine_process import KERNEL_HOOKS, KERNELS_SWITCH, TURN, engine_class, run_scheduler
from miles_plan.backends.sglang_engine.server_arguments import OWN_KERNELS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of SGLang and of the hooks, in order; neither package is imported."""
    said: list[str] = []

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        for each, value in content.items():
            setattr(made, each, value)
        monkeypatch.setitem(sys.modules, name, made)

    class Engine:
        run_scheduler_process_func = staticmethod(lambda *_: None)

    module("sglang", Engine=SimpleNamespace())  # a proxy, as SGLang has it
    module("sglang.srt")
    module("sglang.srt.entrypoints")
    module("sglang.srt.entrypoints.engine", Engine=Engine)
    module("sglang.srt.managers")
    module("sglang.srt.managers.scheduler", run_scheduler_process=lambda *given: said.append(f"scheduler{given}"))
    module("sglang.srt.plugins", GENERAL_PLUGINS_GROUP="sglang.srt.plugins", load_plugins=lambda: said.append("load_plugins"))
    registry = SimpleNamespace(apply_hooks=lambda: said.append("apply_hooks"))
    module("sglang.srt.plugins.hook_registry", HookRegistry=registry)
    module(KERNEL_HOOKS, plugin=lambda: said.append("plugin"))
    monkeypatch.setattr(engine_process, "entry_points", lambda group: [])
    return said


def test_without_the_switch_the_engine_is_sglangs_own(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNELS_SWITCH, raising=False)
    assert engine_class() is sys.modules["sglang.srt.entrypoints.engine"].Engine  # type: ignore[attr-defined]
    assert calls == []


def test_with_it_every_scheduler_takes_the_kernels_first(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, "1")
    made = engine_class()
    assert calls == ["load_plugins", "plugin", "apply_hooks"]  # its arguments name backends that must be known
    assert made.run_scheduler_process_func is run_scheduler
    calls.clear()
    run_scheduler("server_args", "port_args")
    assert calls == ["load_plugins", "plugin", "apply_hooks", "scheduler('server_args', 'port_args')"]


def test_an_installed_plugin_is_not_called_twice(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, "1")
    installed = SimpleNamespace(name="miles_plan", value=f"{KERNEL_HOOKS}:plugin")
    monkeypatch.setattr(engine_process, "entry_points", lambda group: [installed])
    engine_class()
    assert calls == ["load_plugins"]


def test_a_scheduler_touches_nothing_before_its_turn(calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KERNELS_SWITCH, raising=False)
    monkeypatch.setenv(TURN, str(tmp_path / "turn"))
    assert engine_class().run_scheduler_process_func is run_scheduler
    waiting = threading.Thread(target=run_scheduler, args=("server_args",))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert calls == []
    (tmp_path / "turn").touch()
    waiting.join(10.0)
    assert calls == ["scheduler('server_args',)"]


def test_the_names_are_those_of_the_kernels_hooks() -> None:
    hooks = import_module(KERNEL_HOOKS)
    assert (hooks.NAME, hooks.SWITCH) == (OWN_KERNELS, KERNELS_SWITCH)
    assert callable(hooks.plugin)
