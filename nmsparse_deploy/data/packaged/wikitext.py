"""WikiText's tokenised edition as prose. Never compare with figures on the raw edition."""

from __future__ import annotations

import re

_RULES = [
    (re.compile(pattern, re.M), plain)
    for pattern, plain in (
        (r" @([-,.])@ ", r"\1"),
        (r" ([,.:;!?%)\]])", r"\1"),
        (r"([(\[]) ", r"\1"),
        (r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1"),
        (r'" ([^"]*?) "', r'"\1"'),
        (r"^ *(?:= )+(.*?)(?: =)+ *$", r"\1"),
        (r" ?<unk>", ""),
        (r"^ +| +$", ""),
        (r"\n{3,}", "\n\n"),
    )
]


def detokenised(text: str) -> str:
    """Take the spaces and marks of the tokenised edition out again."""
    for pattern, plain in _RULES:
        text = pattern.sub(plain, text)
    return text
