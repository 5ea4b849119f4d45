"""Wanda: keep the largest `|W_ij| · ‖X_j‖` of every group.

With the Gram matrix replaced by its diagonal this minimises the layer's output error over masks exactly. Weights are
not changed. Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, section 3.
"""

from nmsparse_deploy.find.methods.base import score_method

METHOD = score_method(lambda weight, stats: weight.abs() * stats.rms, "norms", "weights times input norms",
                      "Sun et al. 2024, arXiv:2306.11695")
