"""Wikipedia's markup as prose: the articles of a packaged dump."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from pathlib import Path

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
_NOT_PROSE = [
    re.compile(p, re.S)
    for p in (r"<!--.*?-->", r"<ref[^>/]*/>", r"<ref.*?</ref>", r"<math.*?</math>", r"\{\|.*?\|\}")
]
_TAG = re.compile(r"<[^>]+>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_FILE = re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]")
_URL = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_ENTITIES = {
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&amp;": "&",
    "&nbsp;": " ",
    "&ndash;": "–",
    "&mdash;": "—",
}
PARAGRAPH = 150
"""Shorter lines are captions, lists and headings."""


def articles(path: Path) -> Iterator[str]:
    """Yield the prose of every article in a compressed dump, under its title."""
    xml = bz2.decompress(path.read_bytes()).decode("utf-8", "replace")
    for title, markup in _PAGE.findall(xml):
        prose = _prose(markup)
        if prose:
            yield f"{title}\n\n{prose}"


def _prose(markup: str) -> str:
    for _ in range(2):  # entities are escaped twice inside the XML
        for entity, character in _ENTITIES.items():
            markup = markup.replace(entity, character)
    if markup.lstrip().lower().startswith("#redirect"):
        return ""
    for pattern in _NOT_PROSE:
        markup = pattern.sub("", markup)
    while True:
        shorter = _TEMPLATE.sub("", markup)
        if shorter == markup:
            break
        markup = shorter
    markup = _URL.sub(r"\1", _LINK.sub(r"\1", _FILE.sub("", markup)))
    markup = _TAG.sub("", markup).replace("'''", "").replace("''", "")
    lines = (line.strip() for line in markup.splitlines())
    return "\n\n".join(
        line for line in lines if len(line) > PARAGRAPH and line[0] not in "=*#:;|!{}"
    )
