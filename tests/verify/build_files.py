"""Small sparse tensors, and files made byte by byte so that they can lie."""

import json
import struct

import numpy as np
import torch

from nmsparse_deploy.masks import Mask, MaskSet, tensor_hash
from nmsparse_deploy.pattern import TWO_FOUR, project


def dense(*shape, seed=0, dtype=torch.float32):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight.sign().add(weight).to(dtype)  # no value near zero, in any dtype


def sparse(*shape, axis=-1, pattern=TWO_FOUR, seed=0, dtype=torch.float32):
    """(pruned weight, its mask)."""
    weight = dense(*shape, seed=seed, dtype=dtype)
    mask = project(weight.float().abs(), pattern, axis)
    return torch.where(mask, weight.float(), 0.0).to(dtype), Mask.pack(mask, axis, pattern, tensor_hash(weight))


def mask_set(**masks):
    return MaskSet({name.replace("__", "."): mask for name, mask in masks.items()})


def write_raw(path, header, data=b"", length=None):
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def plant(weight, at):
    """Set one value that must not be there."""
    broken = weight.clone()
    broken[at] = 7.0
    return broken


def raw_bytes(array):
    return np.ascontiguousarray(array).tobytes()
