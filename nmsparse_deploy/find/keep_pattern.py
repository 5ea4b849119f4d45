"""Keep the zeros of a pruned model while another program fine-tunes it.

    keep = nms.keep_pattern(model, "runs/mine")          # a run, a mask file or a MaskSet
    trainer = Trainer(model, ..., callbacks=[keep])      # Trainer, TRL, or a loop of your own

After every step of any optimizer of torch the masks are applied to the weights. With LoRA of PEFT
the update is masked instead, in the forward pass and in the merge alike: what was trained is
`W + M * (B A)`, so `merge_and_unload()` loses nothing and the merged model verifies.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.masks import Mask, MaskSet
from nmsparse_deploy.runs.run_dir import RunDir

MASKS = "masks.safetensors"


class KeptPattern(TrainerCallback):
    """The pattern of a model that is trained: a callback of `Trainer`, and a context manager."""

    def __init__(self, model: nn.Module, masks: MaskSet) -> None:
        self._model = weakref.ref(_innermost(model))
        self._masks = {name: _PackedMask(mask) for name, mask in masks.masks.items()}
        weights = self._weights()
        self.zeroed = sum(mask.count(weights[name]) for name, mask in self._masks.items())
        """How many values outside of the masks were not zero at the beginning: of a pruned model
        none, of LoRA that was merged already what its merge loses."""
        self.apply()
        self._hook = register_optimizer_step_post_hook(lambda *_: self.apply())
        weakref.finalize(_innermost(model), self._hook.remove)

    @torch.no_grad()
    def apply(self) -> None:
        """Write +0.0 outside of the masks, and mask LoRA that came in the meantime.

        Raises `UsageError` for adapters that cannot be masked.
        """
        weights = self._weights()
        for name, mask in self._masks.items() if weights else ():
            mask.apply(weights[name])

    def remove(self) -> None:
        """Stop; LoRA that was trained under its mask stays under it."""
        self._hook.remove()

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters by the names that masks have; none when the model is gone."""
        model = self._model()
        if model is None:
            return {}
        self._mask_adapters(model)
        own = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters()
        }
        if missing := sorted(self._masks.keys() - own.keys()):
            raise UsageError(
                f"These masks belong to another model: it has no parameter '{missing[0]}'."
            )
        for name, mask in self._masks.items():
            mask.check(name, own[name])
        return own

    def _mask_adapters(self, model: nn.Module) -> None:
        if "peft" not in sys.modules:
            return
        from peft.tuners.lora import Linear, LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted: list[tuple[str, Any]] = [
            (path, layer)
            for path, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
        ]
        for path, layer in adapted:
            mask = self._masks.get(f"{path.replace('.base_layer', '')}.weight")
            if mask is None:
                continue
            plain = isinstance(layer, Linear) and type(layer).forward is Linear.forward
            variants = layer.lora_variant if isinstance(layer, LoraLayer) else {}
            if not plain or not all(isinstance(each, _MaskedLora) for each in variants.values()):
                kinds = [type(each).__name__ for each in (layer, *variants.values())]
                raise UsageError(
                    f"'{path}' is pruned, and its adapter ({', '.join(kinds)}) cannot be kept under "
                    "a mask; plain LoRA of linear layers can.",
                    "leave the layer out of target_modules",
                )
            layer.lora_variant.update(
                {name: _MaskedLora(mask) for name in layer.lora_A if name not in variants}
            )

    def __enter__(self) -> KeptPattern:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def on_train_begin(self, *_: Any, model: nn.Module | None = None, **__: Any) -> None:
        """Follow a trainer that wrapped the model, or put adapters into it."""
        if model is not None and _innermost(model) is not self._model():
            raise UsageError("The trainer trains another model than the one whose pattern is kept.")
        self.apply()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Apply the masks, also after an optimizer that is not torch's."""
        self.apply()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Apply the masks to what the optimizer left behind (an average, for example)."""
        self.apply()


class _PackedMask:
    """A mask with a bit for each value, on the device of its weight."""

    def __init__(self, mask: Mask) -> None:
        self.shape, self._bits = mask.shape, torch.from_numpy(mask.bits)

    def on(self, device: torch.device) -> torch.Tensor:
        """Unpack the mask, True = keep."""
        self._bits = self._bits.to(device)
        places = torch.arange(8, dtype=torch.uint8, device=device)
        flat = (self._bits[:, None] >> places & 1).bool().view(-1)
        return flat[: torch.Size(self.shape).numel()].view(self.shape)

    def check(self, name: str, weight: torch.Tensor) -> None:
        """Raise `UsageError` where the mask does not fit."""
        if tuple(weight.shape) != self.shape:
            raise UsageError(
                f"These masks do not fit: '{name}' has shape {tuple(weight.shape)}, its mask "
                f"{self.shape}.",
                "weights that are quantised, or divided among processes (ZeRO 3), cannot be masked",
            )

    def pruned(self, weight: torch.Tensor) -> torch.Tensor:
        """Return where the weight is pruned, divided among processes as it is (FSDP2)."""
        pruned = ~self.on(weight.device)
        if isinstance(weight, DTensor):
            mesh, how = weight.device_mesh, weight.placements
            return distribute_tensor(pruned, mesh, how, src_data_rank=None)
        return pruned

    def count(self, weight: torch.Tensor) -> int:
        """Count what is not zero where the weight is pruned."""
        return int(((weight != 0) & self.pruned(weight)).sum())

    def apply(self, weight: torch.Tensor) -> None:
        """Write +0.0 where the weight is pruned, and over minus zeros anywhere."""
        weight.masked_fill_(self.pruned(weight), 0.0).add_(0.0)


class _MaskedLora:
    """A variant of LoRA, as PEFT calls it: the update is zero outside of the mask."""

    def __init__(self, mask: _PackedMask) -> None:
        self.mask = mask

    def _update(self, layer: Any, adapter: str) -> torch.Tensor:
        update: torch.Tensor = layer.get_delta_weight(adapter)
        return torch.where(self.mask.on(update.device), update, 0.0)

    def forward(
        self, layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        update, bias = self._update(layer, active_adapter), layer.lora_B[active_adapter].bias
        rows = update.T if layer.fan_in_fan_out else update
        bias = None if bias is None else bias * layer.scaling[active_adapter]
        return result + linear(layer.lora_dropout[active_adapter](x), rows.to(x.dtype), bias)

    def merge_safe(self, layer: Any, active_adapter: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + self._update(layer, active_adapter).to(weight.dtype)

    def merge_unsafe(self, layer: Any, active_adapter: str, weight: torch.Tensor) -> None:
        weight.data += self._update(layer, active_adapter).to(weight.dtype)

    def unmerge(self, layer: Any, active_adapter: str, weight: torch.Tensor) -> torch.Tensor:
        return weight - self._update(layer, active_adapter).to(weight.dtype)

    def supports_lora_conversion(self) -> bool:
        return False


def keep_pattern(model: nn.Module, masks: MaskSet | RunDir | Path | str) -> KeptPattern:
    """Keep the zeros of `masks` in `model` while it is fine-tuned, fully or with LoRA of PEFT.

    `masks` are a `MaskSet`, its file, or the run that has them. From now on they are applied after
    every step of an optimizer of torch, until `remove()` or the end of a `with` block. The result
    is also a callback for `Trainer` and TRL, which then may put LoRA into the model itself. The
    model is pruned at once if it is not yet (`zeroed` counts the values). A merge of LoRA
    (`merge_and_unload()`) keeps the pattern.

    Raises `UsageError` for masks of another model, and for adapters that cannot be masked.
    """
    if isinstance(masks, MaskSet):
        return KeptPattern(model, masks)
    path = masks.path if isinstance(masks, RunDir) else Path(masks)
    return KeptPattern(model, MaskSet.load(path / MASKS if path.is_dir() else path))


def _innermost(model: Any) -> nn.Module:
    """Return what compilers, parallel wrappers and PEFT put their own module around."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
