"""The arithmetic task of the quickstart, written as JSONL: `python -m miles_plan.data.arithmetic --out DIR --seed N`.

`sft.jsonl` holds demonstrations by a careless pupil: some of its answers are off by one or by ten. A model that imitates them
well is right as often as the pupil, whatever the seed; the reward knows no slips, so what reinforcement learning adds on top is
plain to see. `prompts.jsonl` has the same problems with their right answers, `eval.jsonl` problems that neither contains. Files
are whole or absent: each is written beside its place and renamed when all of them are complete.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from miles_plan.data.order import epoch_order

Operation = Literal["+", "-", "*"]

ALPHABET = "0123456789+-*="
"""Every character of the task, for a character tokenizer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Two whole numbers and what to do with them."""

    left: int
    operation: Operation
    right: int

    @property
    def prompt(self) -> str:
        """Such as `12+7=`."""
        return f"{self.left}{self.operation}{self.right}="

    @property
    def answer(self) -> int:
        """The right answer."""
        if self.operation == "+":
            return self.left + self.right
        return self.left - self.right if self.operation == "-" else self.left * self.right


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticOptions:
    """What to write. Defaults are the quickstart's.

    Operands run from `smallest` to `largest`; `eval_problems` are held out; sft.jsonl has `demonstrations` lines, of which a
    share of `slips` is wrong.
    """

    seed: int = 0
    smallest: int = 0
    largest: int = 19
    operations: tuple[Operation, ...] = ("+",)
    eval_problems: int = 40
    demonstrations: int = 8192
    slips: float = 0.6

    def problems(self) -> list[str]:
        """Why nothing can be written, empty when it can."""
        found = []
        if not 0 <= self.smallest <= self.largest <= 9999:
            found.append(f"operands from {self.smallest} to {self.largest}: need 0 <= smallest <= largest <= 9999")
        if (
            not self.operations
            or set(self.operations) - set(get_args(Operation))
            or len(set(self.operations)) < len(self.operations)
        ):
            found.append(f"operations {''.join(self.operations)!r}: need some of + - *, each once")
        if not 0.0 <= self.slips <= 1.0:
            found.append(f"slips {self.slips}: a share between 0 and 1 is needed")
        if self.demonstrations < 1:
            found.append(f"demonstrations {self.demonstrations}: at least 1 is needed")
        count = len(self.operations) * max(0, self.largest - self.smallest + 1) ** 2
        if not found and not 0 < self.eval_problems < count:
            found.append(f"{self.eval_problems} problems for evaluation: need at least 1 and fewer than all {count}")
        if not found and count > 1_000_000:
            found.append(f"{count} problems are more than a million; lower `largest`")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticTask:
    """The lines of the three files, in order."""

    sft: tuple[Mapping[str, str], ...]
    prompts: tuple[Mapping[str, str], ...]
    eval: tuple[Mapping[str, str], ...]


def arithmetic_task(options: ArithmeticOptions) -> ArithmeticTask:
    """The task, a pure function of its options. ValueError for options that make no task."""
    if found := options.problems():
        raise ValueError("; ".join(found))
    operands = range(options.smallest, options.largest + 1)
    problems = [Problem(left, operation, right) for operation in options.operations for left in operands for right in operands]
    order = epoch_order(len(problems), seed=options.seed, epoch=0)
    held_out = [problems[row] for row in order[: options.eval_problems]]
    trained = [problems[row] for row in order[options.eval_problems :]]
    return ArithmeticTask(
        sft=tuple(_demonstrations(trained, options)),
        prompts=tuple(_question(problem) for problem in trained),
        eval=tuple(_question(problem) for problem in held_out),
    )


def write_task(directory: str | os.PathLike[str], options: ArithmeticOptions) -> dict[str, int]:
    """Write `sft.jsonl`, `prompts.jsonl` and `eval.jsonl`; return their line counts.

    ValueError for bad options; OSError with the path's name when the disk refuses, and then no file is left half written.
    """
    task = arithmetic_task(options)
    contents = {"sft.jsonl": task.sft, "prompts.jsonl": task.prompts, "eval.jsonl": task.eval}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write_together({folder / name: _json_lines(rows) for name, rows in contents.items()})
    return {name: len(rows) for name, rows in contents.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code: 0, or 1 with one line on stderr."""
    defaults = ArithmeticOptions()
    parser = argparse.ArgumentParser(
        prog="python -m miles_plan.data.arithmetic", description="Write the arithmetic task as JSONL."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for sft.jsonl, prompts.jsonl and eval.jsonl")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--smallest", type=int, default=defaults.smallest, help=f"smallest operand ({defaults.smallest})")
    parser.add_argument("--largest", type=int, default=defaults.largest, help=f"largest operand ({defaults.largest})")
    parser.add_argument("--operations", default="".join(defaults.operations), help="some of + - *, without spaces (+)")
    parser.add_argument(
        "--eval", type=int, default=defaults.eval_problems, help=f"problems held out ({defaults.eval_problems})"
    )
    parser.add_argument(
        "--demonstrations", type=int, default=defaults.demonstrations, help=f"lines of sft.jsonl ({defaults.demonstrations})"
    )
    parser.add_argument("--slips", type=float, default=defaults.slips, help=f"share of wrong demonstrations ({defaults.slips})")
    given = parser.parse_args(arguments)
    options = ArithmeticOptions(
        seed=given.seed,
        smallest=given.smallest,
        largest=given.largest,
        operations=tuple(given.operations),
        eval_problems=given.eval,
        demonstrations=given.demonstrations,
        slips=given.slips,
    )
    try:
        counts = write_task(given.out, options)
    except OSError as error:
        print(f"error: {error.filename or given.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("  ".join(f"{Path(given.out) / name} ({count} lines)" for name, count in counts.items()))
    return 0


def _demonstrations(problems: Sequence[Problem], options: ArithmeticOptions) -> Iterable[Mapping[str, str]]:
    # random() keeps its stream across Python versions; choice and shuffle do not promise to.
    generator = random.Random(f"miles-plan arithmetic demonstrations {options.seed}")
    for index in range(options.demonstrations):
        epoch, place = divmod(index, len(problems))
        problem = problems[epoch_order(len(problems), seed=options.seed, epoch=epoch + 1)[place]]
        response = problem.answer
        if generator.random() < options.slips:
            slip = (-10, -1, 1, 10)[int(generator.random() * 4)]
            # The pupil knows that a sum is not negative.
            response += slip if problem.operation == "-" or response + slip >= 0 else -slip
        yield {"prompt": problem.prompt, "response": str(response)}


def _question(problem: Problem) -> Mapping[str, str]:
    return {"id": problem.prompt.removesuffix("="), "prompt": problem.prompt, "answer": str(problem.answer)}


def _json_lines(rows: Iterable[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _write_together(contents: Mapping[Path, bytes]) -> None:
    """All files or, when one cannot be written, none: every byte is on disk before the first rename."""
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            written[path] = _write_beside(path, content)
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
    except OSError as error:
        os.unlink(name)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Path(name)


if __name__ == "__main__":
    sys.exit(main())
