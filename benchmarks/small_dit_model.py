"""A small diffusion transformer of Fashion-MNIST in pixels, and a small classifier whose features
compare pictures.

No package carries a trained diffusion transformer, so this trains one: diffusers'
`DiTTransformer2DModel`, classes as conditions, 28 x 28 pixels in patches of 4, 1.2 million prunable
weights, minutes on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nmsparse_deploy.data.image_source import load_images
from nmsparse_deploy.models.denoising import Noising
from nmsparse_deploy.models.preprocess import Preprocess

DATA, SIDE, CLASSES = "fashion-mnist", 28, 10
SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 6,
    "sample_size": SIDE,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_embeds_ada_norm": CLASSES,
}
STEPS, BATCH, RATE, WARMUP, AVERAGE = 1200, 64, 2e-3, 60, 0.995
AS_TENSOR = Preprocess((SIDE, SIDE), SIDE, (0.5,), (0.5,))


def pictures(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` pictures of a part in -1 to 1, `[count, 1, 28, 28]`, with their classes."""
    source = load_images(DATA, split)
    values = torch.stack([AS_TENSOR(source.open(number)) for number in range(count)])
    return values, torch.tensor([int(label or 0) for label in source.labels[:count]])


def train(folder: Path, steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Train on noise prediction with a tenth of the labels dropped, and save the running average of
    the weights."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(seed)
    data, labels = pictures("train", 60000)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    parametrization = Noising.of(scheduler)
    model = DiTTransformer2DModel(**SHAPE).train()
    quiet_start(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / WARMUP) * max(0.02, 1 - step / steps)
    )
    start, losses = time.perf_counter(), []
    for step in range(steps):
        chosen, at = (
            torch.randint(len(data), (BATCH,)),
            torch.randint(len(parametrization), (BATCH,)),
        )
        clean = data[chosen]
        noise = torch.randn_like(clean)
        told = model(
            parametrization.mixed(clean, noise, at), timestep=at, class_labels=labels[chosen]
        ).sample
        loss = mse_loss(told, parametrization.target(clean, noise, at))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.detach())
        if step % 100 == 99:
            print(
                f"step {step + 1}: loss {torch.stack(losses[-100:]).mean():.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    average.module.eval().save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "loss": float(torch.stack(losses[-200:]).mean()),
    }


def quiet_start(model: nn.Module) -> None:
    """Blocks that begin as the identity and a last layer that begins at zero (DiT, Peebles and Xie
    2023)."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for last in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class Classifier(nn.Module):
    """Two convolutions and 64 features; returns features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x)
        return features, self.head(features)


def classifier(count: int = 30000, epochs: int = 3, seed: int = 0) -> tuple[Classifier, float]:
    """Trained on training pictures; its accuracy on 2000 test pictures."""
    torch.manual_seed(seed)
    data, labels = pictures("train", count)
    model = Classifier()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(count).split(128):
            cross_entropy(model(data[part])[1], labels[part]).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    data, labels = pictures("test", 2000)
    with torch.no_grad():
        return model.eval(), float((model(data)[1].argmax(1) == labels).double().mean())
