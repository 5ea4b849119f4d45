"""Packaged texts by name: articles of Wikipedia, BBC news, and WikiText of the development data."""

from __future__ import annotations

from nmsparse_deploy.data.packaged import corpus_folder, development_file
from nmsparse_deploy.data.packaged.wikipedia import articles
from nmsparse_deploy.data.packaged.wikitext import detokenised
from nmsparse_deploy.data.table_rows import read_plain

DEVELOPMENT = {"wikitext2": "wikitext-2/test.txt", "wikitext2-valid": "wikitext-2/valid.txt"}
"""Texts of the development data; `wikitext2-valid` is for choosing settings, never for
reporting."""


def packaged_documents(source: str) -> tuple[str, ...] | None:
    """Return the documents of a packaged text; None for any other name."""
    if source in DEVELOPMENT:
        file = development_file(source, DEVELOPMENT[source], "use 'bbc' or a file of your own")
        return (detokenised(read_plain(file)),)
    folder = corpus_folder(source, "text")
    if folder is None:
        return None
    if source == "wikipedia":
        return tuple(articles(next(folder.rglob("*.bz2"))))
    return tuple(read_plain(file) for file in sorted(folder.rglob("*.txt")))
