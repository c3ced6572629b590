import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles_plan.data.arithmetic import ALPHABET, ArithmeticOptions, arithmetic_task, main, write_task
from miles_plan.data.demonstrations import open_demonstrations
from miles_plan.data.prompts import open_prompts
from miles_plan.data.tokenizer import CharacterTokenizer

FILES = ["eval.jsonl", "prompts.jsonl", "sft.jsonl"]


def test_the_files_are_what_the_readers_read(tmp_path):
    counts = write_task(tmp_path, ArithmeticOptions(seed=5))
    assert counts == {"sft.jsonl": 8192, "prompts.jsonl": 360, "eval.jsonl": 40}
    tokenizer = CharacterTokenizer(ALPHABET)
    assert len(open_prompts(tmp_path / "prompts.jsonl", tokenizer, seed=0)) == 360
    assert len(open_demonstrations(tmp_path / "sft.jsonl", tokenizer, seed=0)) == 8192
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_training_and_evaluation_share_no_problem_and_cover_all():
    task = arithmetic_task(ArithmeticOptions(seed=1, operations=("+", "-", "*"), largest=9, eval_problems=50))
    train, held_out = {row["prompt"] for row in task.prompts}, {row["prompt"] for row in task.eval}
    assert not train & held_out
    assert len(train) + len(held_out) == 300
    assert {row["prompt"] for row in task.sft} == train
    assert all(int(row["answer"]) == eval(row["prompt"].removesuffix("=")) for row in (*task.prompts, *task.eval))


@pytest.mark.parametrize("slips", [0.0, 0.6, 1.0])
def test_the_share_of_wrong_demonstrations_is_the_one_asked_for(slips):
    task = arithmetic_task(ArithmeticOptions(seed=2, slips=slips))
    right = {row["prompt"]: row["answer"] for row in task.prompts}
    wrong = [row["response"] != right[row["prompt"]] for row in task.sft]
    assert abs(sum(wrong) / len(wrong) - slips) < 0.03
    assert all(not row["response"].startswith("-") for row in task.sft)


def test_the_task_is_a_function_of_the_seed(tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        write_task(tmp_path / name, ArithmeticOptions(seed=seed))
    content = {name: [(tmp_path / name / file).read_bytes() for file in FILES] for name in "abc"}
    assert content["a"] == content["b"]
    assert all(one != other for one, other in zip(content["a"], content["c"], strict=True))


def test_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "miles_plan.data.arithmetic",
        "--out",
        str(tmp_path / "d"),
        "--seed",
        "3",
        "--largest",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert "sft.jsonl (8192 lines)" in done.stdout
    first = json.loads((tmp_path / "d" / "eval.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "prompt", "answer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smallest", "5", "--largest", "4"], "need 0 <= smallest <= largest"),
        (["--operations", "+/"], "need some of + - *"),
        (["--operations", ""], "need some of + - *"),
        (["--slips", "1.5"], "slips 1.5: a share between 0 and 1"),
        (["--slips", "nan"], "slips nan"),
        (["--eval", "400"], "fewer than all 400"),
        (["--demonstrations", "0"], "at least 1 is needed"),
        (["--largest", "9999"], "more than a million"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "d"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_is_named_and_leaves_the_old_files_whole(tmp_path, capsys, monkeypatch, call):
    write_task(tmp_path, ArithmeticOptions(seed=0))
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["--out", str(tmp_path), "--seed", "1"]) == 1
    assert f"{tmp_path}/" in (message := capsys.readouterr().err)
    assert ".jsonl: No space left on device" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "d")]) == 1
    assert f"{tmp_path}/file" in capsys.readouterr().err
