"""Every architecture of Transformers and every family of timm through `inspect` and `prune --method
magnitude`.

    python -m benchmarks.architectures transformers [NAME ...]     writes results/architectures.json
    python -m benchmarks.architectures timm [NAME ...]             writes results/timm.json

Each is built small with random weights, in a process of its own with a time limit; nothing is
downloaded. A row is written as soon as it is known; a repeated command goes on from there and tries
again what failed (`--fresh` starts over). Names run a part and print it only.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from benchmarks.files import read_json, write_json
from benchmarks.small_configs import build
from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.find.inspect import inspect
from nmsparse_deploy.find.plan.make_plan import Plan
from nmsparse_deploy.find.prune import prune
from nmsparse_deploy.masks import MaskSet
from nmsparse_deploy.recipe import Prune
from nmsparse_deploy.system.environment import environment, now

RESULTS = Path(__file__).parent.parent / "results"
FILES = {"transformers": RESULTS / "architectures.json", "timm": RESULTS / "timm.json"}
SECONDS = 60
"""For one architecture."""
FIRST = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "CAUSAL_LM",
    "MULTIMODAL_LM",
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
)
"""Which head an architecture is built with, the first that it has."""
CANDIDATES = 4
"""Members of a timm family among which the smallest is taken."""
Row = dict[str, Any]
Work = Callable[[str, Path], str]
"""`(name, folder)`: build a model into the folder and return its class, or raise `NotBuilt`."""


class NotBuilt(Exception):
    """An architecture that this benchmark cannot build small, or without a package."""


def architectures() -> list[str]:
    """List one architecture of each modelling file of Transformers that has a model."""
    names: dict[str, str] = {}
    for name in CONFIG_MAPPING_NAMES:
        if model_class(name):
            names.setdefault(model_type_to_module_name(name), name)
    return sorted(names.values())


def model_class(name: str) -> str | None:
    tables = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in FIRST]
    others = (n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_NAMES"))
    for table in (*tables, *sorted(set(others) - set(tables), key="MODEL_MAPPING_NAMES".__eq__)):
        found = getattr(modeling_auto, table).get(name)
        if found:
            return str(found if isinstance(found, str) else found[0])
    return None


def build_transformers(name: str, folder: Path) -> str:
    try:
        kind = getattr(transformers, str(model_class(name)))
        config = kind.config_class or getattr(transformers, CONFIG_MAPPING_NAMES[name])
        module: Any = build(kind, config)
        module.save_pretrained(folder)
    except Exception as error:
        raise NotBuilt(first_line(error)) from error
    return kind.__name__


def families() -> list[str]:
    """List the smallest of a few members of each family of timm."""
    import timm

    small = ("test", "atto", "xxs", "nano", "tiny", "xs", "small", "0", "18", "11")
    chosen = []
    for family in timm.list_modules():
        names = sorted(
            timm.list_models(module=family),
            key=lambda n: (n.startswith("test"), not any(w in n for w in small), len(n), n),
        )[:CANDIDATES]
        sizes = {}
        for name in names:
            with torch.device("meta"):
                module = timm.create_model(name, pretrained=False)
            sizes[name] = sum(p.numel() for p in module.parameters())
        chosen += [min(sizes, key=lambda name: (sizes[name], name))] if sizes else []
    return chosen


def build_timm(name: str, folder: Path) -> str:
    import timm

    torch.manual_seed(0)
    try:
        module = timm.create_model(name, pretrained=False).eval()
        timm.models.save_for_hf(module, str(folder), safe_serialization=True)
    except Exception as error:
        raise NotBuilt(first_line(error)) from error
    return type(module).__name__


def row(name: str, work: Work) -> Row:
    """Return what becomes of one architecture: shares of its weights, or why there are none."""
    start, found = time.perf_counter(), Row()
    with tempfile.TemporaryDirectory() as scratch:
        model, where = Path(scratch) / "model", "build"
        try:
            found["class"] = work(name, model)
            where = "inspect"
            plan = inspect(str(model))
            found |= shares(plan)
            where = "prune"
            run = prune(str(model), Prune(method="magnitude"), Path(scratch) / "run")
            found["pruned"] = len(MaskSet.load(run / "masks.safetensors").masks)
        except NotBuilt as error:
            found["not_built"] = str(error)
        except NmsparseError as error:
            found["refused"] = f"{where}: {error.message}".replace(str(model), "the model")
        except Exception as error:
            found["failed"] = f"{where}: {type(error).__name__}: {first_line(error)}"
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def shares(plan: Plan) -> Row:
    """Return what share of the weights that are multiplied is selected, and what stays dense for
    which reason, with the largest weight of each."""
    selected, dense, largest = 0, Counter[str](), dict[str, tuple[int, str]]()

    def stays(reason: str, name: str, size: int) -> None:
        reason = reason.partition(" as ")[0]
        dense[reason] += size
        largest[reason] = max(largest.get(reason, (0, "")), (size, name))

    for entry in plan.rows:
        size = entry.target.k * entry.target.n
        if entry.pattern:
            selected += size
        else:
            stays(entry.reason, entry.target.name, size)
    for skipped in plan.skipped:
        if skipped.gemm:
            stays(skipped.reason, skipped.name, math.prod(skipped.shape))
    every = selected + dense.total()
    return {
        "blocks": len(plan.blocks),
        "weights": every,
        "selected": round(selected / every, 4),
        "dense": {
            reason: {"share": round(size / every, 4), "largest": largest[reason][1]}
            for reason, size in dense.most_common()
        },
    }


def first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:200]


def in_a_process(name: str, work: Work) -> Row:
    """Return the row of `name`, made in a fork that may die or hang."""
    context = multiprocessing.get_context("fork")
    read, write = context.Pipe(duplex=False)

    def child() -> None:
        warnings.filterwarnings("ignore")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            write.send(row(name, work))

    process = context.Process(target=child)
    process.start()
    write.close()
    try:
        found = read.recv() if read.poll(SECONDS) else {"failed": f"no answer in {SECONDS} s"}
    except EOFError:
        found = {"failed": "the process died"}
    process.kill()
    process.join()
    return found


def main(library: str, arguments: list[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    names = [name for name in arguments if not name.startswith("-")]
    every, work = (
        (architectures, build_transformers) if library == "transformers" else (families, build_timm)
    )
    file = FILES[library]
    known = {} if names or "--fresh" in arguments else (read_json(file) or {"rows": {}})["rows"]
    rows: dict[str, Row] = {}
    known = {name: found for name, found in known.items() if "failed" not in found}
    for name in names or every():
        rows[name] = known.get(name) or in_a_process(name, work)
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
        if not names:
            save(file, library, {**known, **rows})
    if not names:
        save(file, library, rows)


def save(file: Path, library: str, rows: dict[str, Row]) -> None:
    settings = "random weights, built small, 2:4, magnitude"
    result = {
        "command": f"python -m benchmarks.architectures {library}",
        "date": now(),
        "settings": settings,
        **environment(),
        "rows": rows,
    }
    write_json(file, result)


def preload() -> Iterable[Any]:
    """Import once what every fork would import."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.bert import modeling_bert
    from transformers.models.llama import modeling_llama
    from transformers.models.vit import modeling_vit

    from nmsparse_deploy.models import libraries

    return (
        AutoModelForCausalLM,
        AutoTokenizer,
        modeling_bert,
        modeling_llama,
        modeling_vit,
        [*libraries()],
    )


if __name__ == "__main__":
    preload()
    main(sys.argv[1], sys.argv[2:])
