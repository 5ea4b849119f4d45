"""Two-block vision models, an encoder, and pictures, all made in code."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = ("blue", "green", "red")
PIXELS = 56


def dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=PIXELS,
                             patch_size=14)).eval().save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
                       patch_size=8, id2label=dict(enumerate(CLASSES)), label2id={n: i for i, n in enumerate(CLASSES)})
    ViTForImageClassification(config).eval().save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    """Two stages of blocks with 3 x 3 kernels."""
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")).eval(
    ).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte between [CLS] and [SEP]."""
    names = ["[PAD]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1),
                                                                                                 ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                                   model_max_length=64)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                         vocab_size=260, max_position_embeddings=64)).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def picture(kind: str, seed: int, side: int = 24) -> Image.Image:
    """Noise that is brighter in one colour."""
    values = np.random.default_rng(seed).integers(0, 120, (side, side, 3))
    values[..., {"red": 0, "green": 1, "blue": 2}[kind]] += 130
    return Image.fromarray(values.astype(np.uint8))


def labelled(folder: Path, train: int = 12, test: int = 6) -> Path:
    """train/CLASS/NN.png and test/CLASS/NN.png."""
    for split, count, start in (("train", train, 0), ("test", test, 1000)):
        for number, kind in enumerate(CLASSES):
            place = folder / split / kind
            place.mkdir(parents=True)
            for index in range(count):
                picture(kind, start + 100 * number + index).save(place / f"{index:02d}.png")
    return folder


def photos(folder: Path, count: int = 4) -> Path:
    folder.mkdir()
    for index in range(count):
        picture("green", 5000 + index, 40).save(folder / f"photo{index}.png")
    return folder


def idx(folder: Path, images: int = 8, split: str = "train", claim: int | None = None) -> Path:
    """The two .gz files of one split; `claim` lies about the number of images."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(7).integers(0, 256, (images, 28, 28)).astype(np.uint8)
    head = struct.pack(">iiii", 0x803, claim or images, 28, 28)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
    labels = struct.pack(">ii", 0x801, images) + bytes(i % 3 for i in range(images))
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder
