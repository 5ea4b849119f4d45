"""What pruning cost, measured on the same held-out samples for the dense and the pruned model."""

from .arms import Arm, onnx_arms, torch_arm
from .diffusion import evaluate_diffusion
from .encoder import evaluate_encoder
from .imagenet import evaluate_imagenet
from .papers import evaluate_papers
from .perplexity import PROMPTS, continuations, paired_ratio, perplexity
from .result import BOOTSTRAP, EvalResult, paired_difference
from .vision import evaluate_vision

__all__ = ["BOOTSTRAP", "PROMPTS", "Arm", "EvalResult", "continuations", "evaluate_diffusion", "evaluate_encoder",
           "evaluate_imagenet", "evaluate_papers", "evaluate_vision", "onnx_arms", "paired_difference", "paired_ratio",
           "perplexity", "torch_arm"]
