"""What pruning cost, measured on the same held-out samples for the dense and the pruned model."""

from .perplexity import PROMPTS, continuations, paired_ratio, perplexity
from .result import BOOTSTRAP, EvalResult, paired_difference

__all__ = ["BOOTSTRAP", "PROMPTS", "EvalResult", "continuations", "paired_difference", "paired_ratio", "perplexity"]
