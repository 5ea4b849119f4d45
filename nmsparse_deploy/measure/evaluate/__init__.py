"""What pruning cost, measured on the same held-out samples for the dense and the pruned model."""

from nmsparse_deploy.measure.evaluate.arms import Arm, onnx_arms, torch_arm
from nmsparse_deploy.measure.evaluate.diffusion import evaluate_diffusion
from nmsparse_deploy.measure.evaluate.encoder import evaluate_encoder
from nmsparse_deploy.measure.evaluate.imagenet import evaluate_imagenet
from nmsparse_deploy.measure.evaluate.perplexity import PROMPTS, continuations, paired_ratio, perplexity
from nmsparse_deploy.measure.evaluate.published_protocols import evaluate_papers
from nmsparse_deploy.measure.evaluate.result import BOOTSTRAP, EvalResult, paired_difference
from nmsparse_deploy.measure.evaluate.vision import evaluate_vision

__all__ = ["BOOTSTRAP", "PROMPTS", "Arm", "EvalResult", "continuations", "evaluate_diffusion", "evaluate_encoder",
           "evaluate_imagenet", "evaluate_papers", "evaluate_vision", "onnx_arms", "paired_difference", "paired_ratio",
           "perplexity", "torch_arm"]
