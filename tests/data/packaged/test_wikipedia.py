"""Markup of Wikipedia becomes prose, and nothing else is left of it."""

from __future__ import annotations

import bz2

from nmsparse_deploy.data.packaged.wikipedia import articles


def test_wikipedia_markup_becomes_prose(tmp_path):
    long = "A '''sparse''' [[matrix (maths)|matrix]] has few entries. " * 6
    page = (
        f"<page><title>Sparse</title><text xml:space='preserve'>{{{{Infobox|x={{{{y}}}}}}}}\n{long}"
        "&lt;ref&gt;Book&lt;/ref&gt; [[File:A.png|thumb|a [[link]] here]]\n== Heading ==\nshort line\n"
        "{| class=wikitable\n|-\n| cell\n|}\n</text></page>"
        "<page><title>R</title><text>#REDIRECT [[Sparse]]</text></page>"
    )
    file = tmp_path / "x.bz2"
    file.write_bytes(bz2.compress(page.encode()))
    assert list(articles(file)) == [
        "Sparse\n\n" + ("A sparse matrix has few entries. " * 6).strip()
    ]
