"""Magnitude pruning: keep the largest `|W|` of every group. Needs no data; the floor every other method must beat.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015; Mishra et al., Accelerating
Sparse Deep Neural Networks, 2021 (the 2:4 form). Unstructured, all weights of the matrix compete.
"""

from nmsparse_deploy.find.methods.base import score_method

METHOD = score_method(lambda weight, stats: weight.abs(), "none", "largest weights of each group",
                      "Mishra et al. 2021, arXiv:2104.08378", scope="layer")
