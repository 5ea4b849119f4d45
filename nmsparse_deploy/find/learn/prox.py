"""The proximal operator of `λ e_{N+1}(|w|)`, the regulariser of ProxSparse, exact for every
keep:group.

    prox(z) = argmin_w  ½ ‖w - z‖² + λ e_{N+1}(|w₁|, …, |w_M|)

`e_k` is the elementary symmetric polynomial; `e_{N+1}` is zero exactly when at most N entries of
the block are not. Signs and order factor out, so a block is sorted, `z₁ ≥ … ≥ z_M ≥ 0`. For every
size of the support from N to M the first entries are found by exact coordinate updates

    w_i <- max(z_i - λ e_N(the others), 0)

and the cheapest of all is the answer. The updates start from zero, smallest entry first, and from
two balanced points, one constant and one in proportion to `z`: near equal entries zero alone leads
to a local minimum. A block is divided by its largest entry `c` first,
`prox_λ(c z) = c prox_{λ c^(N-1)}(z)`, so that tolerances are relative.

Kübler et al., A Proximal Operator for Inducing 2:4-Sparsity, 2025, arXiv:2501.18015; Liu et al.,
ProxSparse, ICML 2025, arXiv:2502.00258, section 3 (both 2:4). The balanced starts, the general
keep:group and the certificate are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from math import comb

import torch

from nmsparse_deploy.pattern import NMPattern

SWEEPS = 300
"""Coordinate sweeps at most: most blocks rest after a few, and near the critical strength a hundred
are needed."""
CHUNK = 1 << 16
"""Blocks solved together: their vectors stay in the processor's cache."""
NEWTON = 30


def prox(
    weight: torch.Tensor, strength: float, pattern: NMPattern, sweeps: int = SWEEPS
) -> torch.Tensor:
    """Apply the operator to every group of `weight` `[..., n]`, groups along the last axis;
    `strength` is λ.

    Works in fp32 at least. With fewer `sweeps` the answer near the critical strength is not quite
    at rest. Among equal entries the lowest index is the largest afterwards. Raises `ValueError` for
    a negative strength.
    """
    if strength < 0:
        raise ValueError(f"the strength {strength} is negative")
    if strength == 0 or weight.numel() == 0:
        return weight.clone()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    blocks = wide.reshape(-1, pattern.group)
    parts = [_blocks(part, strength, pattern.keep, sweeps) for part in blocks.split(CHUNK)]
    return torch.cat(parts).view_as(weight).to(weight)


def _blocks(blocks: torch.Tensor, strength: float, keep: int, sweeps: int) -> torch.Tensor:
    """Apply the operator to `[blocks, group]`: sort, scale, solve what is not settled, and restore
    order and signs."""
    z, order = blocks.abs().sort(dim=-1, descending=True, stable=True)
    z = z.T.contiguous()  # one entry of all blocks is one vector
    largest = torch.where(z[0] > 0, z[0], 1.0)
    scaled, strengths = z / largest, strength * largest ** (keep - 1)
    solved = _quadratic(scaled, strength) if keep == 1 else _cases(scaled, strengths, keep, sweeps)
    w = torch.where(
        solved == scaled, z, torch.minimum(solved * largest, z)
    )  # what did not move keeps its bits
    return torch.zeros_like(blocks).scatter_(-1, order, w.T).copysign(blocks)


def _quadratic(z: torch.Tensor, strength: float) -> torch.Tensor:
    """Solve N = 1, where `w_i + λ Σ_{j≠i} w_j = z_i` on the support is linear; from λ = 1 on only
    the largest entry stays.

    With `S_s = Σ_{i≤s} z_i / (1 + λ(s-1))` the sum of a support of `s`, the right `s` is the last
    with `z_s > λ S_s`.
    """
    solved = torch.zeros_like(z)
    if strength >= 1:
        solved[0] = z[0]
        return solved
    sizes = torch.arange(len(z), device=z.device, dtype=z.dtype).unsqueeze(1)  # s - 1
    sums = z.cumsum(0) / (1 + strength * sizes)
    last = ((z > strength * sums).sum(0, keepdim=True) - 1).clamp(min=0)
    return ((z - strength * sums.gather(0, last)) / (1 - strength)).clamp_(min=0)


def _cases(z: torch.Tensor, strength: torch.Tensor, keep: int, sweeps: int) -> torch.Tensor:
    """Solve N > 1: each block by the least work that is certain to find its minimum."""
    solved = z.clone()
    solved[keep:] = 0.0
    settled, convex = _settled(z, strength, keep), _convex(z, strength, keep)
    for some, solve in ((convex & ~settled, _only), (~convex & ~settled, _cheapest)):
        if len(places := some.nonzero().squeeze(1)):
            solved[:, places] = solve(z[:, places], strength[places], keep, sweeps)
    return solved


def _settled(z: torch.Tensor, strength: torch.Tensor, keep: int) -> torch.Tensor:
    """Find blocks whose answer is certainly to keep the N largest as they are.

    A cheaper `w` has cost below `t²/2` with `t² = Σ_{j>N} z_j²`, so `w_i ≥ z_i - t`. Were `w_{N+1}`
    positive, it would be stationary, `z_{N+1} > λ w₁⋯w_N`; a `λ Π (z_i - t)` above `z_{N+1}`
    contradicts it.
    """
    t = z[keep:].square().sum(0).sqrt()
    return strength * (z[:keep] - t).clamp(min=0).prod(0) > z[keep]


def _convex(z: torch.Tensor, strength: torch.Tensor, keep: int) -> torch.Tensor:
    """Find blocks whose objective is convex for `0 ≤ w ≤ z`: one start finds its only minimum.

    The Hessian is one on the diagonal and `λ e_{N-1}(all but two)` off it, which is at most
    `λ C(M-2, N-1)` where the largest entry is one; rows that sum to less than one off the diagonal
    make it positive definite.
    """
    return strength * ((len(z) - 1) * comb(len(z) - 2, keep - 1)) < 1


def _only(z: torch.Tensor, strength: torch.Tensor, keep: int, sweeps: int) -> torch.Tensor:
    """Return the minimum of a convex block."""
    return _descend(z, strength, keep, z.clone(), sweeps).sort(dim=0, descending=True).values


def _cheapest(z: torch.Tensor, strength: torch.Tensor, keep: int, sweeps: int) -> torch.Tensor:
    """Return the best of all cases, for sorted blocks `z` `[group, blocks]` with largest entry
    one."""
    best = z.clone()
    best[keep:] = 0.0
    least = _cost(best, z, strength, keep)
    margin = (
        1 - 2 * torch.finfo(z.dtype).eps
    )  # equal up to rounding: the sparser case, which came first
    for size in range(keep + 1, len(z) + 1):
        for start in _starts(z[:size], strength, keep):
            w = torch.zeros_like(z)
            w[:size] = _descend(z[:size], strength, keep, start, sweeps)
            cost = _cost(w, z, strength, keep)
            better = cost < least * margin
            least = torch.where(better, cost, least)
            best = torch.where(better, w, best)
    return best.sort(
        dim=0, descending=True
    ).values  # rounding must not undo the order, which the minimiser keeps


def _starts(z: torch.Tensor, strength: torch.Tensor, keep: int) -> Iterator[torch.Tensor]:
    """Yield zero, and two balanced points: of `s` equal entries `z̄` each becomes the root of
    `w + λ C(s-1, N) w^N = z̄`."""
    yield torch.zeros_like(z)
    mean = z.mean(0)
    factor = strength * comb(len(z) - 1, keep)
    root = mean.clone()
    for _ in range(NEWTON):  # convex and increasing: from above it converges without a safeguard
        root -= (root + factor * root**keep - mean) / (1 + keep * factor * root ** (keep - 1))
    yield root.expand_as(z).clone()
    yield z * (root / mean)


def _descend(
    z: torch.Tensor, strength: torch.Tensor, keep: int, w: torch.Tensor, sweeps: int
) -> torch.Tensor:
    """Sweep over the coordinates from `w`, which is used up, until no entry moves; blocks that came
    to rest drop out."""
    done, left = torch.empty_like(w), torch.arange(w.shape[1], device=w.device)
    tolerance = (
        8 * torch.finfo(z.dtype).eps
    )  # below, rounding keeps some blocks going round in circles
    for _ in range(sweeps):
        moving = _sweep(z, strength, keep, w) > tolerance
        if int(moving.sum()) < 0.8 * len(moving):  # to copy them costs as much as a sweep
            done[:, left] = w
            left, z, strength, w = left[moving], z[:, moving], strength[moving], w[:, moving]
            if not len(left):
                return done
    done[:, left] = w
    return done


def _sweep(z: torch.Tensor, strength: torch.Tensor, keep: int, w: torch.Tensor) -> torch.Tensor:
    """Update every coordinate of `w` once, last first; returns how far the farthest moved.

    `e_N` of the others comes from the polynomials of those before (still old) and of those after
    (already new).
    """
    before = [_ones(strength, keep)]
    for entry in w[:-1]:
        before.append(_with(before[-1], entry))
    after, moved = _ones(strength, keep), torch.zeros_like(strength)
    for i in reversed(range(len(w))):
        others = reduce(torch.add, (a * b for a, b in zip(before[i], reversed(after))))
        new = torch.addcmul(z[i], strength, others, value=-1).clamp_(min=0)
        moved = torch.maximum(moved, (new - w[i]).abs_())
        after = _with(after, new)
        w[i] = new
    return moved


def _ones(like: torch.Tensor, keep: int) -> list[torch.Tensor]:
    """Return `e_0 … e_N` of no entries."""
    return [torch.ones_like(like), *(torch.zeros_like(like) for _ in range(keep))]


def _with(polynomials: list[torch.Tensor], entry: torch.Tensor) -> list[torch.Tensor]:
    """Return `e_0 … e_N` with one more entry."""
    return [polynomials[0], *(torch.addcmul(b, entry, a) for a, b in pairwise(polynomials))]


def _cost(w: torch.Tensor, z: torch.Tensor, strength: torch.Tensor, keep: int) -> torch.Tensor:
    polynomials = _ones(strength, keep + 1)
    for entry in w:
        polynomials = _with(polynomials, entry)
    return (w - z).square().sum(0) / 2 + strength * polynomials[-1]
