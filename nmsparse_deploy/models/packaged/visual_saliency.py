"""The saliency ViT of the `vit` asset: an ONNX graph, converted once into a Transformers folder and
a small head."""

from __future__ import annotations

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nmsparse_deploy.errors import MissingExtra, NmsparseError
from nmsparse_deploy.models.preprocess import Preprocess
from nmsparse_deploy.system.assets import assets, cache_dir, digest, fetch

KEY = "vit"
HEAD = "saliency_head.safetensors"
SIZE = 224
"""Pixels of the square image that the head was trained for."""
LAYER_NORM = 1e-6


Arrays = dict[str, np.ndarray]


class SaliencyHead(nn.Module):
    """Patch tokens to a saliency map: three transposed convolutions, each doubling the side, and a
    sigmoid."""

    def __init__(self, widths: tuple[int, ...] = (384, 256, 128, 64)) -> None:
        super().__init__()
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            self.add_module(
                f"upconv{number}",
                nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1),
            )
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.stages = len(widths) - 1
        self.final_conv = nn.Conv2d(widths[-1], 1, kernel_size=1)

    def forward(self, tokens: torch.Tensor, size: int = SIZE) -> torch.Tensor:
        """`tokens` [batch, 1 + patches, width], the class token first, to maps [batch, size, size]
        in 0..1."""
        batch, count, width = tokens.shape
        side = int((count - 1) ** 0.5)
        x = tokens[:, 1:].transpose(1, 2).reshape(batch, width, side, side)
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(x)).relu()
        x = self.final_conv(x)
        return nn.functional.interpolate(x, (size, size), mode="bilinear", align_corners=False)[
            :, 0
        ].sigmoid()


def model_folder() -> Path:
    """Return a folder that `Dinov2Model.from_pretrained` loads, with the head beside it; converted
    once and cached."""
    path = graph_path()
    folder = cache_dir() / "converted" / digest(path)[:32]
    if not (folder / HEAD).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _convert(path, work / "model")
            (work / "model").rename(folder)
        except OSError:
            if not (folder / HEAD).is_file():  # another process may have been quicker
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def graph_path() -> Path:
    """Return the ONNX file as its package ships it."""
    return fetch(KEY) / assets()[KEY].files[0]


def load_head() -> SaliencyHead:
    """Load the head that turns patch tokens into a saliency map."""
    head = SaliencyHead()
    head.load_state_dict(load_file(model_folder() / HEAD))
    return head.eval()


def _convert(path: Path, folder: Path) -> None:
    from transformers import Dinov2Config

    values, weights = _read(path)
    backbone = {
        name.removeprefix("backbone."): torch.from_numpy(v)
        for name, v in (values | weights).items()
        if name.startswith("backbone.")
    }
    width = backbone["embeddings.cls_token"].shape[-1]
    patch = backbone["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = len({name.split(".")[2] for name in backbone if name.startswith("encoder.layer.")})
    table = next(
        v for n, v in values.items() if n.startswith("onnx::") and v.ndim == 3 and v.shape[1] > 1
    )
    first = next(
        v for n, v in values.items() if n.startswith("onnx::") and v.shape == (1, 1, width)
    )
    backbone["embeddings.position_embeddings"] = torch.cat(
        [torch.from_numpy(first), torch.from_numpy(table)], 1
    )
    backbone["embeddings.mask_token"] = torch.zeros(1, width)
    head = {
        name.removeprefix("decoder."): torch.from_numpy(v)
        for name, v in values.items()
        if name.startswith("decoder.")
    }
    head |= {
        f"bn{n}.num_batches_tracked": torch.tensor(0) for n in range(1, SaliencyHead().stages + 1)
    }
    side = round(table.shape[1] ** 0.5) * patch
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=side,
        layer_norm_eps=LAYER_NORM,
        architectures=["Dinov2Model"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    # Through the file and `from_pretrained`, which renames what this version of the library calls
    # otherwise.
    save_file(
        {k: v.contiguous() for k, v in backbone.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    Preprocess((SIZE, SIZE), SIZE).save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in head.items()}, folder / HEAD)


def _read(path: Path) -> tuple[Arrays, Arrays]:
    """Read initializers by name, and the nameless MatMul weights under the name of the bias added
    after them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtra("onnx", "onnx", f"The model '{KEY}'") from error
    graph = onnx.load(str(path)).graph
    values = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in graph.initializer}
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            bias = next((name for name in adds[node.output[0]].input if name in values), None)
            if bias is None:
                raise NmsparseError(
                    f"'{path}' is not the graph this tool knows: a MatMul has no bias."
                )
            weights[bias.removesuffix(".bias") + ".weight"] = values[node.input[1]].T.copy()
    return values, weights
