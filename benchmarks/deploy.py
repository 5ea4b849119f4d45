"""Two-block models of six families through export, verification, ONNX Runtime and TensorRT-RTX's
compiler.

`python benchmarks/deploy.py results/deploy-cpu.json` writes what docs/deployment.md shows;
`--only llama` one family. Weights are random: this is about graphs and compilers, not about
accuracy.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from files import write_json

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.masks import Mask, MaskSet, project, tensor_hash
from nmsparse_deploy.models.discovery import discover
from nmsparse_deploy.pattern import TWO_FOUR
from nmsparse_deploy.prove import verify_onnx
from nmsparse_deploy.prove.agreement import agreement
from nmsparse_deploy.ship.onnx import LinkMap, export_onnx
from nmsparse_deploy.ship.onnx.cached import check_steps, export_cached
from nmsparse_deploy.ship.onnx.onnxruntime import OnnxRuntime
from nmsparse_deploy.ship.onnx.qdq import insert_qdq
from nmsparse_deploy.ship.onnx.share import share_weights
from nmsparse_deploy.ship.quantise import calibrate
from nmsparse_deploy.ship.tensorrt.rtx import TensorRtRtx
from nmsparse_deploy.system.environment import environment, now

WIDTH, INNER, HEADS, VOCABULARY = 128, 256, 4, 128
PRECISIONS = (
    ("fp16", ""),
    ("int8", "channel"),
    ("int8", "tensor"),
    ("fp8", "channel"),
    ("fp8", "tensor"),
)
OPSETS = (20, 23)
SIZES = {"batch": 2, "sequence": 128, "past": 128}


def ids(batch, length):
    return {
        "input_ids": torch.randint(
            0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch)
        )
    }


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            intermediate_size=INNER,
            vocab_size=VOCABULARY,
        )
    ), ids


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=2,
            ffn_dim=INNER,
            num_attention_heads=HEADS,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
        )
    ), ids


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=WIDTH,
            n_layer=2,
            n_head=HEADS,
            vocab_size=VOCABULARY,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=1,
        )
    ), ids


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY)
    ), ids


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    def pictures(batch, length):
        return {
            "pixel_values": torch.randn(
                batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch)
            )
        }

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            image_size=64,
            patch_size=8,
            num_labels=10,
        )
    ), pictures


def dit():
    from diffusers import DiTTransformer2DModel

    def latents(batch, length):
        made = torch.Generator().manual_seed(batch)
        return {
            "hidden_states": torch.randn(batch, 4, 16, 16, generator=made),
            "timestep": torch.arange(batch) * 100,
            "class_labels": torch.arange(batch) % 10,
        }

    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    ), latents


FAMILIES = {"Llama": llama, "OPT": opt, "GPT-2": gpt2, "BLOOM": bloom, "ViT": vit, "DiT": dit}


def bake(module, targets):
    """2:4 by magnitude; returns the masks."""
    masks = {}
    for target in targets:
        weight = module.get_parameter(target.name)
        keep = project(weight.detach().abs(), TWO_FOUR, target.axis)
        masks[target.name] = Mask.pack(keep, target.axis, TWO_FOUR, tensor_hash(weight))
        weight.data = torch.where(keep, weight.data, torch.zeros(()))
    return MaskSet(masks)


def output_of(result):
    return next(
        getattr(result, name)
        for name in ("logits", "sample", "last_hidden_state")
        if hasattr(result, name)
    )


@torch.no_grad()
def compared(path, module, inputs):
    """Agreement in ONNX Runtime, or why there is none."""
    reference = output_of(module(**inputs))
    try:
        output = next(iter(OnnxRuntime.build(path, {"optimization": "basic"}).run(inputs).values()))
        return asdict(agreement(reference, output, "logits" if reference.ndim < 4 else "features"))
    except NmsparseError as error:
        return {"failed": error.message}


def compiled(path, groups, links):
    """What TensorRT-RTX makes of it, with the fusion groups that became one GEMM, or why it
    refuses."""
    try:
        settings = {"batch": SIZES["batch"], "length": SIZES["sequence"], "past": SIZES["past"]}
        made = TensorRtRtx.build(path, settings).compiled
    except NmsparseError as error:
        return {"failed": error.message}
    of = {row.node: row.parameter for row in links}
    together = [{of[node] for node in nodes if node in of} for nodes in made.merged]
    merged = sum(any(group <= some for some in together) for group in groups)
    pruned = [gemm for gemm in made.gemms if any(node in of for node in gemm.nodes)]
    return {
        "version": made.version,
        "gemms": len(pruned),
        "eight_bit_in": sum(
            all(kind in ("Int8", "FP8") for kind in gemm.inputs) for gemm in pruned
        ),
        "eight_bit_out": sum(gemm.eight_bit for gemm in pruned),
        "groups": len(groups),
        "merged": merged,
        "fp32": len(made.wide),
        "generated": len(made.generated),
        "lost": len(made.lost),
    }


def rows_of(family, folder):
    torch.manual_seed(0)
    module, inputs = FAMILIES[family]()
    module.eval()
    found = discover(module, inputs(2, 16))
    by_fusion = {}
    for target in found.targets:
        by_fusion.setdefault(target.fusion, set()).add(target.name)
    groups = [group for group in by_fusion.values() if len(group) > 1]
    masks = bake(module, found.targets)
    ranges = calibrate(module, found.targets, [inputs(4, 32)])
    for opset in OPSETS:
        base = folder / f"{opset}"
        base.mkdir()
        try:
            export_onnx(
                module, inputs(2, 16), base, "model", found.targets, precision="fp16", opset=opset
            )
        except NmsparseError as error:
            yield {
                "family": family,
                "opset": opset,
                "precision": "fp16",
                "scales": "",
                "failed": error.message,
            }
            continue
        for precision, scales in PRECISIONS:
            place = folder / f"{opset}-{precision}-{scales}"
            shutil.copytree(base, place)
            path, link = place / "model.onnx", LinkMap.load(place / "model.link.json")
            if precision != "fp16":
                link = insert_qdq(
                    path, link, ranges, precision, set(masks.masks), scales == "tensor"
                ).link
            report = verify_onnx(path, masks, link.by_parameter())
            yield {
                "family": family,
                "opset": opset,
                "precision": precision,
                "scales": scales,
                "verified": report.checked if report.ok else report.summary(),
                "agreement": compared(path, module, inputs(3, 24)),
                "rtx": compiled(path, groups, link.rows),
            }


def steps_of(family, folder):
    """Prefill and decode of a language model: agreement, and what the compiler makes of them."""
    torch.manual_seed(0)
    module, inputs = FAMILIES[family]()
    module.eval()
    found = discover(module, inputs(2, 16))
    bake(module, found.targets)
    row = {"family": family}
    try:
        graphs = export_cached(module, folder, found.targets)
        row["bytes_shared"] = share_weights(folder, [graph.name for graph in graphs])
        sessions = {
            graph.name: OnnxRuntime.build(folder / f"{graph.name}.onnx") for graph in graphs
        }
        row["agreement"] = asdict(check_steps(module, sessions, inputs(2, 20)["input_ids"]))
        row["rtx"] = {
            graph.name: compiled(folder / f"{graph.name}.onnx", [], graph.link.rows)
            for graph in graphs
        }
    except NmsparseError as error:
        row["failed"] = error.message
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", help="a family; may be repeated")
    given = parser.parse_args()
    rows, steps, missing = [], [], []
    for family in given.only or FAMILIES:
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows += list(rows_of(family, Path(folder)))
            if FAMILIES[family]()[1] is ids:
                with tempfile.TemporaryDirectory() as folder:
                    steps.append(steps_of(family, Path(folder)))
        except ImportError as error:
            missing.append({"family": family, "why": f"{error.name} is not installed"})
        print(family, flush=True)
    data = {
        "command": f"python benchmarks/deploy.py {given.out}",
        "date": now(),
        **environment(),
        "sizes": SIZES,
        "rows": rows,
        "steps": steps,
        "missing": missing,
    }
    write_json(given.out, data)


if __name__ == "__main__":
    main()
