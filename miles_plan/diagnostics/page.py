"""The page of a diagnostic code: what `explain MP201` prints and docs/diagnostics.md lists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One code's page.

    code: `MP` and three digits. title: a noun phrase. what: the condition, precisely. why: what would happen otherwise.
    example: the lines that show it (YAML or output). fix: what to do.
    """

    code: str
    title: str
    what: str
    why: str
    example: str
    fix: str

    def markdown(self) -> str:
        """The page as a section of docs/diagnostics.md."""
        example = self.example.strip("\n")
        return (
            f"### {self.code}: {self.title}\n\n"
            f"**What.** {self.what}\n\n**Why.** {self.why}\n\n**Example.**\n\n```yaml\n{example}\n```\n\n**Fix.** {self.fix}\n"
        )

    def text(self) -> str:
        """The page as the terminal shows it."""
        example = "\n".join(f"    {line}".rstrip() for line in self.example.strip("\n").splitlines())
        return (
            f"{self.code}: {self.title}\n\nWhat  {self.what}\n\nWhy   {self.why}\n\nExample\n\n{example}\n\nFix   {self.fix}\n"
        )
