"""What a diffusion model denoises: an image, through an autoencoder if there is one, with noise by
a scheduler's law.

    x_t = a_t x_0 + b_t e,   e ~ N(0, 1)

with `a_t = sqrt(alpha_bar_t)`, `b_t = sqrt(1 - alpha_bar_t)` where the scheduler diffuses (Ho et
al. 2020, arXiv:2006.11239), and `a_t = 1 - sigma_t`, `b_t = sigma_t` where it lets noise flow
(Lipman et al. 2023, arXiv:2210.02747).
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.outputs import primary_output
from nmsparse_deploy.models.own_code import diffusers_class
from nmsparse_deploy.models.preprocess import Preprocess

SCHEDULER = "scheduler"
"""The folder that diffusers keeps a scheduler's settings in, beside or below the transformer."""
INPUT = "hidden_states"
LABELS = "class_labels"
WIDTHS = {
    "encoder_hidden_states": ("caption_channels", "joint_attention_dim", "cross_attention_dim"),
    "pooled_projections": ("pooled_projection_dim",),
}
"""Arguments that carry an embedded text, and which setting says how wide it is."""
FLOW = "flow"
BATCH = 8
"""Images that pass through an autoencoder at a time."""


@dataclass(frozen=True)
class Noising:
    """One row a training step of the scheduler: what the model is told, and the two factors
    `[steps]`, fp32."""

    timesteps: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    predicts: str
    """`epsilon`, `v_prediction`, `sample` or `flow`."""

    @classmethod
    def of(cls, scheduler: Any) -> Noising:
        """Read the law a scheduler was trained with; samplers share its settings."""
        import diffusers

        config = scheduler.config
        predicts = config.get("prediction_type", "epsilon")
        flows = diffusers.FlowMatchEulerDiscreteScheduler
        if isinstance(scheduler, flows) or predicts == "flow_prediction":
            law: Any = (
                flows.from_config(config)
                if isinstance(scheduler, flows)
                else flows(config.get("num_train_timesteps", 1000), config.get("flow_shift") or 1.0)
            )
            return cls(law.timesteps.float(), 1 - law.sigmas.float(), law.sigmas.float(), FLOW)
        alphas = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.float()
        return cls(torch.arange(len(alphas)), alphas.sqrt(), (1 - alphas).sqrt(), predicts)

    def __len__(self) -> int:
        return len(self.timesteps)

    def mixed(self, clean: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Mix `x_t` `[samples, ...]` of clean samples at training steps `[samples]`."""
        return (
            self._at(self.signal, step, clean) * clean + self._at(self.noise, step, clean) * noise
        )

    def target(self, clean: torch.Tensor, noise: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the answer of a perfect model."""
        if self.predicts == "epsilon":
            return noise
        if self.predicts == "sample":
            return clean
        if self.predicts == FLOW:
            return noise - clean
        return (
            self._at(self.signal, step, clean) * noise - self._at(self.noise, step, clean) * clean
        )

    @staticmethod
    def _at(table: torch.Tensor, step: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return table.to(like.device)[step.to(like.device)].view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Denoising:
    """The way one model's inputs are made.

    `vae` is the autoencoder's folder; None: the model denoises pixels, or nothing here can encode
    images for it (`preprocess` is None then).
    """

    scheduler: Any
    assumed: bool
    """No scheduler came with the model, so one was taken."""
    preprocess: Preprocess | None
    vae: Path | None = None

    @property
    def noising(self) -> Noising:
        return Noising.of(self.scheduler)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images `[samples, channels, height, width]` in -1 to 1 as the model knows them:
        each code's mean."""
        if self.vae is None:
            return images
        vae = _autoencoder(self.vae)
        parts = []
        for part in images.split(BATCH):
            code = vae.encode(part)
            parts.append(code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent)
        return (torch.cat(parts) - _shift(vae)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode what `encode` makes, clamped to -1 to 1."""
        latents = latents.float().cpu()
        if self.vae is not None:
            vae = _autoencoder(self.vae)
            latents = torch.cat(
                [
                    vae.decode(part / vae.config.scaling_factor + _shift(vae)).sample
                    for part in latents.split(BATCH)
                ]
            )
        return latents.clamp(-1, 1)

    def to_json(self) -> dict[str, object]:
        """Return what a record says of the scheduler and the autoencoder."""
        return {
            "scheduler": type(self.scheduler).__name__,
            "scheduler_assumed": self.assumed,
            "autoencoder": self.vae.name if self.vae else None,
        }


@cache
def _autoencoder(folder: Path) -> Any:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = diffusers_class(settings, folder, "ModelMixin", "autoencoder")
    return kind.from_pretrained(folder, torch_dtype=torch.float32).eval()


def _shift(vae: Any) -> float:
    return float(vae.config.get("shift_factor") or 0.0)


def sample_size(module: Any) -> tuple[int, int]:
    """Return height and width of what the model denoises."""
    size = module.config.get("sample_size")
    if size is None:
        raise NmsparseError(
            f"{type(module).__name__} does not say what size it denoises (sample_size).",
            "add it to the config.json",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def prediction(output: Any, like: torch.Tensor) -> torch.Tensor:
    """Take what a forward pass says about the noised samples `like`, without the learned variances
    that may follow."""
    return primary_output(output).value[:, : like.shape[1]]


def conditions(module: Any) -> dict[str, int]:
    """Map what the model is conditioned on beside the timestep: argument -> number of classes, or
    width."""
    named = inspect.signature(module.forward).parameters
    widths = {LABELS: module.config.get("num_embeds_ada_norm")} if LABELS in named else {}
    for name in (name for name in WIDTHS if name in named):
        widths[name] = next(
            (module.config[key] for key in WIDTHS[name] if module.config.get(key)), None
        )
    return {name: count for name, count in widths.items() if count}
