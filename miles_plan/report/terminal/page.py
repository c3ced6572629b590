"""The page that terminal sections draw on: headings, tables and bars that fit its width, with or without colour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from miles_plan.report.printable import printable

WIDEST = 132
ASCII = str.maketrans("▁▂▃▄▅▆▇█▒·●■▸─→…\N{EN DASH}", "_.:-=+*#=.*#>->~-", "") | {ord("∞"): "inf"}


@dataclass(frozen=True, slots=True)
class Page:
    """A console and how much to show on it. full: every row and column, not only what a first look needs."""

    console: Console
    full: bool = False

    @property
    def width(self) -> int:
        """Columns to draw in: lines longer than WIDEST are hard to follow."""
        return min(self.console.width, WIDEST)

    @property
    def coloured(self) -> bool:
        """Whether colour may carry meaning; where not, bars spell their parts in letters."""
        return self.console.color_system is not None and not self.console.no_color

    def show(self, *renderables: RenderableType) -> None:
        """Print each on lines of its own."""
        for renderable in renderables:
            self.console.print(renderable, width=self.width, highlight=False)

    def heading(self, title: str, summary: str = "") -> None:
        """A section's title and, at the right, the one thing to know about it; below the title where the line is too short."""
        title, summary = printable(title), printable(summary)
        rule = self.width - cell_len(title) - cell_len(summary) - 2
        self.console.print()
        if rule < 3:
            self.show(Text.assemble((f"{title} ", "bold"), ("─" * (self.width - cell_len(title) - 1), "dim")))
            self.show(Text(f"  {summary}"))
            return
        self.show(Text.assemble((f"{title} ", "bold"), ("─" * rule, "dim"), f" {summary}" if summary else ("─", "dim")))

    def note(self, *parts: str | Text, indent: int = 2) -> None:
        """A paragraph, wrapped, its lines indented alike."""
        paragraph = Text("").join(text(part) for part in parts)
        self.show(Padding(paragraph, (0, 0, 0, indent)))


def text(value: object, style: str = "") -> Text:
    """A value as rich text: never read as markup, control characters written out."""
    return value if isinstance(value, Text) else Text(printable(value), style=style)


def grid(*columns: str, right: Iterable[str] = (), indent: int = 2) -> Table:
    """A table without lines; columns named in `right` are right-aligned, those named `` have no title."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=any(columns))
    if indent:
        table.add_column("", width=indent - 2 if indent > 2 else 0, no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in set(right) else "left", overflow="fold")
    return table


def bar(width: int, spans: Iterable[tuple[float, float, str, str]]) -> Text:
    """`width` cells, filled by spans (from, to, character, style) on a scale from 0 to 1; later spans lie over earlier ones.

    A span that is not empty fills one cell at least.
    """
    cells: list[tuple[str, str]] = [(" ", "")] * width
    for begin, end, character, style in spans:
        if end <= begin:
            continue
        first = min(width - 1, max(0, round(begin * width)))
        for at in range(first, min(width, max(first + 1, round(end * width)))):
            cells[at] = (character, style)
    filled = Text()
    for character, style in cells:
        filled.append(character, style=style)
    return filled


def head(page: Page, title: str, right: str, facts: Iterable[tuple[str, str]]) -> None:
    """The first lines of a page: title and what stands at its right, then facts, each with its name before it."""
    line = Table.grid(expand=True)
    line.add_column(overflow="fold")
    line.add_column(justify="right")
    line.add_row(text(title, "bold"), text(right, "dim"))
    page.show(line)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(text(name), text(value))
    page.show(table)


def flow(items: Sequence[Text], width: int) -> Text:
    """Items one after the other, as many a line as fit, none broken in two."""
    lines: list[Text] = [Text()]
    for item in items:
        if lines[-1] and lines[-1].cell_len + 2 + item.cell_len > width:
            lines.append(Text())
        lines[-1] = Text.assemble(lines[-1], "  " if lines[-1] else "", item)
    return Text("\n").join(lines)


def padded(value: Text, width: int) -> Text:
    """`value` filled with blanks up to `width` columns of the terminal."""
    filled = value.copy()
    filled.append(" " * max(0, width - filled.cell_len))
    return filled


def widest(values: Iterable[str], title: str = "") -> int:
    """The width of a column that holds these values under this title."""
    return max((cell_len(value) for value in (title, *values)), default=0)


def draw(console: Console, sections: Callable[[], None]) -> None:
    """Run `sections` and write what they print: no trailing blanks in a pipe, ASCII where nothing else can be written."""
    with console.capture() as captured:
        sections()
    drawn = captured.get()
    if not console.is_terminal:
        drawn = "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())
    if console.options.ascii_only:
        drawn = drawn.translate(ASCII).encode("ascii", "backslashreplace").decode("ascii")
    console.file.write(drawn)
    console.file.flush()
