"""The prompts that an iteration has drawn, as they travel from the data to rollout and reward."""

from __future__ import annotations

from dataclasses import dataclass

from miles_plan.backends.engine import Request
from miles_plan.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class DrawnPrompts:
    """The prompts of an iteration, and the requests that ask for all samples of each."""

    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    first_id: int = 0

    @property
    def requests(self) -> list[Request]:
        """One request a sample, a prompt's samples side by side; ids follow from positions, so they are unique within a run."""
        return [
            Request(
                sample_id=self.first_id + prompt.position * self.samples_per_prompt + number,
                prompt_id=self.first_id + prompt.position,
                prompt=prompt.tokens,
            )
            for prompt in self.prompts
            for number in range(self.samples_per_prompt)
        ]

    def by_id(self) -> dict[int, Prompt]:
        """Prompts by the id their samples carry."""
        return {self.first_id + prompt.position: prompt for prompt in self.prompts}
