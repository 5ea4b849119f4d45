"""The figure of merit: the share of the gap between SparseGPT and dense that is closed, in
logarithms of perplexity.

Both ends are those of a frozen baseline (`baseline.py`). Standard library only.
"""

from __future__ import annotations

import math
from typing import Any


def gap_ends(baseline: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Perplexity of `dense` and `sparsegpt` on every text of the baseline's protocol."""
    return {
        text: {
            line["method"]: line[text]["ppl"]
            for line in baseline["table"]
            if line["method"] in ("dense", "sparsegpt")
        }
        for text in baseline["protocol"]["texts"]
    }


def gap_closed(log: float, end: dict[str, float]) -> float:
    """1 for the dense model, 0 for SparseGPT; `log` is the logarithm of a perplexity on the text of
    `end`."""
    dense, reference = math.log(end["dense"]), math.log(end["sparsegpt"])
    return (reference - log) / (reference - dense)
