"""A section of a report as data; the pages decide what it looks like, and no section knows of HTML
or Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Tone = Literal["", "soft", "callout", "bad"]


@dataclass(frozen=True)
class Paragraph:
    """Text, escaped by whatever page it ends up in."""

    text: str
    tone: Tone = ""
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list of short texts, each with an optional bold beginning."""

    items: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, such as commands."""

    text: str
    wrap: bool = False
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    items: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Column:
    """The head of a column. Figures stand to the right and keep to one line; text stands to the
    left and may wrap."""

    title: str
    holds: Literal["figures", "text"] = "figures"


@dataclass(frozen=True)
class Cell:
    """A value as it is read, with its unit, where it needs more than its text."""

    text: str
    tone: Literal["", "good", "bad"] = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first cell of a row names it. `label` is what a screen reader calls the
    table."""

    label: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    caption: str = ""
    small: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Graphic:
    """An SVG element or a PNG in base64, with the words that stand for it where it cannot be
    seen."""

    data: str
    words: str
    format: Literal["svg", "png"] = "svg"


@dataclass(frozen=True)
class Figure:
    """Graphics side by side; `narrow` takes their place on a phone. In Markdown their words stand
    for all of it."""

    graphics: tuple[Graphic, ...]
    caption: str = ""
    narrow: tuple[Graphic, ...] = ()
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Fold:
    """Blocks that stay closed until a reader asks for them. `page_only` leaves them out of the
    Markdown."""

    title: str
    blocks: tuple[Block, ...]
    open: bool = False
    page_only: bool = False
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; a section among the blocks of another is a
    subsection."""

    title: str
    blocks: tuple[Block, ...]
    key: str = ""
    """What addresses the section in a page."""
    kind: ClassVar[str] = "section"


Block = Paragraph | Bullets | Code | Facts | Table | Figure | Fold | Section


def columns(*heads: str, text: tuple[str, ...] = ()) -> tuple[Column, ...]:
    """Make the columns of a table from their titles; those in `text` hold words."""
    return tuple(Column(head, "text" if head in text else "figures") for head in heads)
