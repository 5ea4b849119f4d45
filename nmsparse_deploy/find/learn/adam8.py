"""AdamW whose two moments take a byte each, for models whose logits would not fit otherwise.

A moment is kept in blocks of `BLOCK` numbers as one scale `c`, the largest magnitude, and a code
`k` per number:

    m = c sgn(k) (|k| / 127)²,    √v = c (k / 255)⁴

Powers reach far down: to 6e-5 and 2e-10 of the largest of a block. A moment moves by a few percent
a step, less than codes lie apart, so codes are rounded up or down by chance, in proportion; rounded
to the nearest they would never fall. The update is in fp32:

    m <- β₁ m + (1-β₁) g,   v <- β₂ v + (1-β₂) g²,   w <- w (1 - η λ) - η m̂ / (√v̂ + ε)

Block-wise 8-bit states: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022,
arXiv:2110.02861. The powers and the rounding are this project's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from nmsparse_deploy.find.learn.step_context import digest

BLOCK = 128
EPSILON = 1e-8
STATE_BYTES = 2 + 2 * torch.float32.itemsize / BLOCK
"""Of both moments of a number, with their scales."""
CODES = {"m": torch.int8, "root": torch.uint8}
_MOST = {"m": 127, "root": 255}
_HALVINGS = {"m": 1, "root": 2}
"""How often a share is turned into its square root before it becomes a code."""


class AdamW8(torch.optim.Optimizer):
    """AdamW with moments of eight bits; parameters and gradients are fp32."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        rate: float,
        betas: tuple[float, float],
        decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": rate, "betas": betas, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of every parameter that has a gradient."""
        index = 0
        for group in self.param_groups:
            for value in group["params"]:
                index += 1
                if value.grad is not None:
                    self._update(index, value, value.grad, group)

    def _update(
        self, index: int, value: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        state, (first, second) = self.state[value], group["betas"]
        state["step"] = state.get("step", torch.zeros(())) + 1
        count = int(state["step"])
        m = read(state, "m", value).mul_(first).add_(gradient, alpha=1 - first)
        root = (
            read(state, "root", value)
            .square_()
            .mul_(second)
            .addcmul_(gradient, gradient, value=1 - second)
            .sqrt_()
        )
        value.mul_(1 - group["lr"] * group["weight_decay"])
        step = m / (root / (1 - second**count) ** 0.5 + EPSILON)
        value.add_(step, alpha=-group["lr"] / (1 - first**count))
        chance = torch.Generator(value.device).manual_seed(digest("moments", index, count))
        write(state, "m", m, chance)
        write(state, "root", root, chance)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with the codes in their own dtypes; the base class turns every state
        into the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, dtype in CODES.items():
                if name in state:
                    state[name] = state[name].to(dtype)


def read(state: Mapping[str, torch.Tensor], name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a moment in the shape of `value`; zero before the first step."""
    if name not in state:
        return torch.zeros_like(value)
    codes = state[name].float() / _MOST[name]
    share = codes.abs()
    for _ in range(_HALVINGS[name]):
        share = share.square()
    moment = share.copysign(codes) * state[f"{name}-scale"].unsqueeze(1)
    return moment.flatten()[: value.numel()].view_as(value)


def write(state: dict[str, Any], name: str, moment: torch.Tensor, chance: torch.Generator) -> None:
    """Keep a moment as codes `[blocks, BLOCK]` and scales."""
    blocks = pad(moment.flatten(), (0, -moment.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    share = blocks.abs() / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    for _ in range(_HALVINGS[name]):
        share = share.sqrt()
    drawn = torch.rand(share.shape, generator=chance, device=share.device)
    codes = (share * _MOST[name] + drawn).floor_().clamp_(max=_MOST[name])
    if name == "root":
        codes = torch.where(
            blocks > 0, codes.clamp(min=1), 0.0
        )  # nothing that moved is divided by nothing
    state[name] = codes.copysign(blocks).to(CODES[name]) if name == "m" else codes.to(CODES[name])
    state[f"{name}-scale"] = scale
