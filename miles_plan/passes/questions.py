"""What `explain --why-not` can be asked: sizes of the two layouts, and any field of the spec.

`train.tp=4` asks about every trainer with tp 4, whatever its other sizes; `recompute=none` about the job with that field set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from miles_plan.diagnostics import nearest
from miles_plan.passes.feasibility import AskedSizes
from miles_plan.spec.fields import all_fields, pattern_of

TRAIN_SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
ROLLOUT_SIZES = ("engines", "tp", "pp", "ep", "dp_attention")
SHORT_NAMES = {
    "rollout.dpa": "rollout.dp_attention",
    "rollout_gpus": "placement.rollout_gpus",
    "transport": "weight_sync.transport",
    "recompute": "train.recompute",
    "tokens_per_gpu": "train.tokens_per_gpu",
    "max_tokens_per_gpu": "train.tokens_per_gpu",
    "offload": "train.optimizer.offload",
    "optimizer.offload": "train.optimizer.offload",
    "mode": "schedule.mode",
    "memory_fraction": "rollout.memory_fraction",
}
LARGEST_SIZE = 1_000_000


class QuestionError(ValueError):
    """A question that cannot be asked; the message says why and what was probably meant."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked, all of it at once. asked: canonical names with values as text; settings: overrides of the spec."""

    asked: tuple[tuple[str, str], ...]
    sizes: AskedSizes
    settings: tuple[tuple[str, str], ...]

    def overrides(self, fixed_layouts: Sequence[str] = ()) -> Iterator[str]:
        """The spec's overrides for `--set`: what is asked, and layouts that the spec fixes set free where sizes are asked."""
        yield from (f"{field}=auto" for field in fixed_layouts)
        yield from (f"{field}={value}" for field, value in self.settings)


def read_questions(texts: Sequence[str]) -> Questions:
    """Parse `name=value` texts. QuestionError for the first that makes no sense."""
    asked: dict[str, str] = {}
    train: dict[str, int] = {}
    rollout: dict[str, int] = {}
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise QuestionError(f"--why-not {text}: write name=value, for example train.tp=4")
        field = _canonical(name)
        if asked.get(field, value) != value:
            raise QuestionError(f"--why-not asks for {field}={asked[field]} and {field}={value} at once")
        asked[field] = value
        side, _, size = field.partition(".")
        if side == "train" and size in TRAIN_SIZES:
            train[size] = _size(field, value)
        elif side == "rollout" and size in ROLLOUT_SIZES:
            rollout[size] = _size(field, value)
        elif field == "placement" and value.isdigit():
            settings[field] = f"{{rollout_gpus: {value}}}"
        elif field == "placement.rollout_gpus":
            settings["placement"] = f"{{rollout_gpus: {_size(field, value)}}}"
        else:
            settings[field] = value
    return Questions(tuple(asked.items()), AskedSizes(train, rollout), tuple(settings.items()))


def _canonical(name: str) -> str:
    """The name as answers call it; QuestionError with the nearest one for a name that nothing goes by."""
    name = name.replace("train.layout.", "train.").replace("rollout.layout.", "rollout.")
    name = SHORT_NAMES.get(name, name)
    sizes = {f"train.{size}" for size in TRAIN_SIZES} | {f"rollout.{size}" for size in ROLLOUT_SIZES}
    fields = all_fields()
    if name in sizes or name == "placement.rollout_gpus" or pattern_of(name) in fields:
        return name
    known = {*sizes, *SHORT_NAMES, *fields}
    ends = [each for each in sorted(sizes) if each.rpartition(".")[2] == name]
    close = nearest(name, known) or (f"{' or '.join(ends)}" if ends else "")
    raise QuestionError(f"--why-not {name}: there is no such field{f'; did you mean {close}?' if close else ''}")


def _size(field: str, value: str) -> int:
    if not value.isdigit() or not 0 < int(value) <= LARGEST_SIZE:
        raise QuestionError(f"--why-not {field}={value}: {field} is a whole number above 0")
    return int(value)
