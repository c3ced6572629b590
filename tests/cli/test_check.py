from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.spec.example import SMALL, VALID, write
from tests.spec.test_yaml_tree import BOMBS

ROOT = Path(__file__).parent.parent.parent
PLANNER_WITHOUT = ("torch", "ray", "transformers", "triton", "sglang")


def miles_plan(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miles_plan", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_a_fine_spec(tmp_path: Path) -> None:
    spec = write(tmp_path, SMALL)
    done = miles_plan("check", spec)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{spec}: no mistakes found\n", "")


def test_mistakes_of_several_specs_at_once(tmp_path: Path) -> None:
    write(tmp_path, VALID + "colour: red\n", "base.yaml")
    one = write(tmp_path, "base: base.yaml\nseed: x\n", "one.yaml")
    two = write(tmp_path, "base: base.yaml\nseed: y\n", "two.yaml")
    done = miles_plan("check", one, two, write(tmp_path, SMALL), "--format", "concise")
    assert done.returncode == 1
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["error[MP120]", "error[MP122]", "error[MP122]"]


def test_warnings_alone_are_fine(tmp_path: Path) -> None:
    done = miles_plan("check", write(tmp_path, SMALL), "--set", "data.reward=no_such_package.rewards:score")
    assert done.returncode == 0
    assert "warning[MP144]" in done.stdout


@pytest.mark.parametrize("format", ["full", "concise", "json", "sarif", "github"])
def test_every_format_has_the_same_exit_code(tmp_path: Path, format: str) -> None:
    done = miles_plan("check", write(tmp_path), "--set", "seed=x", "--format", format)
    assert done.returncode == 1
    assert "MP122" in done.stdout
    if format in ("json", "sarif"):
        json.loads(done.stdout)


@pytest.mark.parametrize(
    "args", [["check"], ["chek", "x"], ["check", "x", "--format", "xml"], ["check", "x", "--sett", "a=1"], []]
)
def test_wrong_usage(args: list[str]) -> None:
    done = miles_plan(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    spec = write(tmp_path, VALID + "".join(f"key_{index}: 1\n" for index in range(90)))
    command = f"{sys.executable} -m miles_plan check {spec} --format sarif | head -1"  # more than a pipe holds
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == "{\n"


def test_an_ascii_locale_prints_any_name(tmp_path: Path) -> None:
    spec = write(tmp_path, VALID, "spéc.yaml")
    done = miles_plan("check", spec, "--set", "naïve=1", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_colors_only_where_they_are_wanted(tmp_path: Path) -> None:
    assert "\x1b" not in miles_plan("check", write(tmp_path), "--set", "seed=x").stdout


def test_no_heavy_import_and_quick(tmp_path: Path) -> None:
    """A cold check of a small job takes under two seconds and imports nothing that a planner does not need."""
    spec = write(tmp_path, SMALL)
    code = (
        "import sys; from miles_plan.cli.check import check\n"
        f"check([{spec!r}])\n"
        f"print([name for name in {PLANNER_WITHOUT} if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert miles_plan("check", spec).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """One process checks every bomb in turn: the peak is that of the worst. The last line is its own maximum in MiB."""
    specs = [write(tmp_path, text, f"{index}.yaml") for index, text in enumerate(BOMBS.values())]
    (tmp_path / "large.yaml").write_bytes(b"a: " + b"x" * (100 << 20))
    code = (
        "import re, sys, time; from miles_plan.cli.check import findings_of\n"
        "for spec in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    found, _ = findings_of(spec, [])\n"
        "    assert found, spec\n"
        "    assert time.process_time() - start < 3.0, (spec, time.process_time() - start)\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]) // 1024)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *specs, str(tmp_path / "large.yaml")]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200
    assert time.monotonic() - start < 60
