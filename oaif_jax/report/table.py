"""A table of text cells, for the terminal (rich) and for a README (Markdown)."""

import dataclasses
from collections.abc import Iterator, Sequence

import rich.box
import rich.table
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.padding import Padding
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; columns of numbers are set to the right. Two columns are facts, shown without a header."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def facts(self) -> bool:
        return len(self.columns) == 2

    def left(self, column: int) -> bool:
        """Whether a column is text: it's the first, a fact, or one of its cells starts with a letter."""
        return column == 0 or self.facts or any(row[column][:1].isalpha() for row in self.rows)


def to_rich(table: Table) -> Padding:
    """A table for the terminal; texts are shown as they are, never read as markup."""
    return Padding(Fitting(table), (0, 0, 1, 0))


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A table as the terminal shows it: in columns, or a row at a time where it isn't wide enough for these."""

    table: Table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[rich.table.Table | Text | Padding]:
        table, columns = self.table, self._columns()
        wanted = Measurement.get(console, options.update(max_width=10_000), columns).maximum
        if table.facts or wanted <= options.max_width:
            yield columns
            return
        yield Text(table.title, style="bold")
        for row in table.rows:
            named = zip(table.columns[1:], row[1:], strict=True)
            yield Text(row[0])
            yield Padding(Text("\n").join(Text(f"{name}: {cell}") for name, cell in named), (0, 0, 0, 2))
        if table.note:
            yield Text(table.note, style="dim")

    def _columns(self) -> rich.table.Table:
        table = self.table
        shown = rich.table.Table(
            title=Text(table.title, style="bold"),
            title_justify="left",
            caption=Text(table.note, style="dim") if table.note else None,
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1),
            pad_edge=False,
            collapse_padding=True,
            show_edge=False,
            show_header=not table.facts,
        )
        for i, name in enumerate(table.columns):
            justify = "left" if table.left(i) else "right"
            shown.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not table.facts)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        return shown


def to_markdown(table: Table) -> str:
    """A table for a README."""
    rule = "|".join("---" if table.left(i) else "---:" for i in range(len(table.columns)))
    lines = [f"**{_markdown_text(table.title)}**", "", _markdown_row(table.columns), f"|{rule}|"]
    lines += [_markdown_row(row) for row in table.rows]
    lines += ["", _markdown_text(table.note)] if table.note else []
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|*`[]":
        text = text.replace(mark, "\\" + mark)
    return text
