"""cuSPARSELt itself: right numbers, the promised size, graphs, compilers, and kernels that are
sparse by name."""

from __future__ import annotations

import pytest
import torch

from nmsparse_deploy.ship.tensorrt.log import is_sparse_kernel
from nmsparse_deploy.ship.torch_sparse.kernel_choice import time_pair, twins
from nmsparse_deploy.ship.torch_sparse.packed import stored_share
from nmsparse_deploy.ship.torch_sparse.profile_kernels import profile_kernels
from nmsparse_deploy.ship.torch_sparse.semi_structured import DTYPES, kernels
from nmsparse_deploy.system.cuda_graphs import record
from nmsparse_deploy.system.gpu_clock import require_gpu

pytestmark = pytest.mark.gpu
PRECISIONS = tuple(DTYPES)


def able(precision: str) -> None:
    why = kernels().why_not(precision)
    if why is not None:
        pytest.skip(why)


def both(pair, x):
    with torch.inference_mode():
        return [
            one.multiply(x) if hasattr(one, "multiply") else one.rows(x)
            for one in (pair.dense, pair.sparse)
        ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", (1, 17, 256))
def test_sparse_and_dense_multiply_alike(device, precision, rows):
    able(precision)
    pair = twins(256, 128, precision, device, biased=True)
    dense, sparse = both(pair, pair.reads(rows))
    assert (
        sparse.shape == (rows, 128)
        and (dense - sparse).float().norm() / dense.float().norm() < 0.01
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_setting_of_the_search_is_right(device, precision):
    able(precision)
    pair = twins(512, 256, precision, device)
    x = pair.reads(64)
    wanted = both(pair, x)[0]
    eight = hasattr(pair.sparse, "alpha")
    settings = kernels().search(
        x, pair.sparse.weight, 256, None, pair.sparse.alpha if eight else None, pair.out
    )
    assert settings
    for setting in settings:
        pair.sparse.settings[64] = setting
        assert (both(pair, x)[1] - wanted).float().norm() / wanted.float().norm() < 0.01, setting


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_compressed_weight_has_the_promised_size(device, precision):
    able(precision)
    pair = twins(1024, 512, precision, device)
    assert pair.sparse.weight_bytes == stored_share(DTYPES[precision]) * pair.dense.weight_bytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_replays_what_was_recorded(device, precision):
    able(precision)
    pair = twins(256, 128, precision, device)
    x = torch.randn(32, 256, device=device).to(pair.out)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return pair.sparse(x)

    replay = record(call)
    x.mul_(0.5)
    found = replay().clone()
    with torch.inference_mode():
        assert torch.equal(found, pair.sparse(x))


@pytest.mark.parametrize("precision", ("fp16", "fp8"))
def test_a_compiler_leaves_the_product_alone(device, precision):
    able(precision)
    pair = twins(256, 128, precision, device, biased=True)
    x = torch.randn(32, 256, device=device).to(pair.out)
    whole = torch.compile(lambda x: torch.relu(pair.sparse(x)), fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(whole(x), torch.relu(pair.sparse(x)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernel_is_sparse_by_name_and_only_in_the_sparse_layer(device, precision):
    able(precision)
    pair = twins(1024, 1024, precision, device)
    x = torch.randn(512, 1024, device=device).to(pair.out)
    for layer, sparse in ((pair.dense, False), (pair.sparse, True)):
        module = torch.nn.Sequential(layer)

        def call(module=module) -> None:
            with torch.inference_mode():
                module(x)

        found, _ = profile_kernels(call, module, ["0"])
        assert any(map(is_sparse_kernel, found["0"])) is sparse, found


def test_a_timing_is_positive_and_paired(device):
    able("fp16")
    times = time_pair(twins(512, 512, "fp16", device), 256, require_gpu("This test"), 5)
    assert len(times.dense) == len(times.sparse) == 5 and min(*times.dense, *times.sparse) > 0
