"""Names to code: what is known of every entry without loading it, and the code, imported on first
use.

Another package adds entries by entry points (docs/plugins.md):

    [project.entry-points."nmsparse_deploy.methods"]
    my-method = "my_package:MY_METHOD"

`my_package.MY_METHOD` is a `MethodEntry`, as in the tables below. It is read when somebody asks for
its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Generic, Literal, TypeVar

from nmsparse_deploy.errors import MissingExtra, NmsparseError, UsageError, first_line
from nmsparse_deploy.pattern import Scope

Need = Literal["none", "norms", "gram"]
NEEDS: tuple[Need, ...] = ("none", "norms", "gram")
"""Statistics of a layer's inputs, from least to most; each contains those before it."""


@dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """What is known of an entry before its code is loaded."""

    code: str
    """`module:attribute`."""
    summary: str = ""
    source: str = ""
    """Who published it."""
    package: tuple[str, str] | None = None
    """An optional library that the code calls, and the extra of this package that brings it."""

    def require(self, what: str) -> None:
        """Raise `MissingExtra` when `what` calls a library that is not installed."""
        if self.package is not None and find_spec(self.package[0]) is None:
            raise MissingExtra(*self.package, what)


@dataclass(frozen=True, kw_only=True)
class MethodEntry(RegistryEntry):
    """A one-shot method; its code is `prune_layer(weight, stats, pattern, mask=None)`."""

    needs: Need
    updates_weights: bool
    ranks: bool = False
    """The code is `scores(weight, stats)`, and the shared projection keeps the highest."""
    scope: Scope | None = None
    """Which weights compete for an unstructured mask; None: the method needs groups and finds N:M
    masks only."""
    quantises: bool = False
    """The code takes a `grid` besides, and rounds what it keeps to it."""
    only: str | None = None
    """The one pattern of a method that knows no other."""


@dataclass(frozen=True, kw_only=True)
class LearnerEntry(RegistryEntry):
    """A learned method; its code is a `Learned`."""

    updates_weights: bool = False
    settings: str | None = None
    """`module:class` of the section `learn`, a `Learn`; None: one of ours, or that class itself."""


@dataclass(frozen=True, kw_only=True)
class RefinementEntry(RegistryEntry):
    """A refinement; its code is `refine(layer, step)`, `refine(block, step)` or
    `refine(whole, step)`, by `level`.

    What refines a whole model comes after everything else. What changes weights alone follows any
    mask.
    """

    level: Literal["layer", "block", "model"]
    needs: Need
    changes: Literal["mask", "weights", "both"]
    unstructured: bool = False
    """The mask it changes may be an unstructured one."""
    settings: str | None = None
    """`module:class` of the step in a recipe, a `Step`; None: one of ours, or that class itself."""


E = TypeVar("E", bound=RegistryEntry)


class Registry(Generic[E]):
    """Entries by name: our own, and those that other packages offer in the entry-point group
    `group`."""

    def __init__(self, kind: str, group: str, entry: type[E], own: dict[str, E]) -> None:
        self.kind, self.group, self.entry, self.own = kind, group, entry, own

    def names(self) -> list[str]:
        return sorted(self.own.keys() | self._offered().keys())

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._offered()

    def __getitem__(self, name: str) -> E:
        """Return what is known of `name`. Raises `UsageError` for a name that is not there,
        `NmsparseError` for an entry of another package that cannot be read."""
        if self.check(name) in self.own:
            return self.own[name]
        offer = self._offered()[name]
        with self.blamed(name):
            entry = offer.load()
            if not isinstance(entry, self.entry):
                raise TypeError(f"{offer.value} is no {self.entry.__name__}")
            _check_facts(entry)
            return entry

    def check(self, name: str) -> str:
        """Return `name` if it is registered; raise `UsageError` with the nearest name otherwise."""
        if name in self:
            return name
        raise unknown(self.kind, name, self.names())

    def load(self, name: str) -> Any:
        """Import the code of `name`."""
        entry = self[name]
        with self.blamed(name):
            return load(entry.code)

    def readable(self) -> tuple[dict[str, E], list[NmsparseError]]:
        """Return all entries that can be read, by name, and what is wrong with the others."""
        entries: dict[str, E] = {}
        faults: list[NmsparseError] = []
        for name in self.names():
            try:
                entries[name] = self[name]
            except NmsparseError as error:
                faults.append(error)
        return entries, faults

    def _blame(self, name: str, error: Exception) -> NmsparseError:
        """Return the sentence for an entry of another package that failed to load."""
        package = _package(self._offered()[name])
        return NmsparseError(
            f"The package '{package}' offers the {self.kind} '{name}', which cannot be loaded: "
            f"{type(error).__name__}: {first_line(error)}.",
            f"update the package, or pip uninstall {package}",
        )

    def _offered(self) -> dict[str, EntryPoint]:
        offers: dict[str, EntryPoint] = {}
        for offer in installed(self.group):
            if offer.name in self.own or offer.name in offers:
                first = _package(offers[offer.name]) if offer.name in offers else "nmsparse-deploy"
                raise NmsparseError(
                    f"The package '{_package(offer)}' offers the {self.kind} '{offer.name}', which is "
                    f"one of '{first}' already.",
                    f"pip uninstall {_package(offer)}",
                )
            offers[offer.name] = offer
        return offers

    @contextmanager
    def blamed(self, name: str) -> Iterator[None]:
        """Turn every error inside into a sentence about the package that offers `name`, unless it
        is this one."""
        try:
            yield
        except Exception as error:
            if name in self.own:
                raise
            raise self._blame(name, error) from error


def load(path: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def unknown(kind: str, name: str, names: list[str]) -> UsageError:
    """Return the refusal of a name that is not there, with the nearest one that is."""
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    return UsageError(f"There is no {kind} called '{name}'.{guess}", f"one of: {', '.join(names)}")


def _check_facts(entry: RegistryEntry) -> None:
    """Raise `ValueError` for a fact of the wrong type."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(type(entry)).validate_python(vars(entry))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from error


@cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, in a fixed order."""
    return tuple(sorted(entry_points(group=group), key=lambda offer: (_package(offer), offer.name)))


def _package(offer: EntryPoint) -> str:
    return offer.dist.name if offer.dist is not None else offer.value.partition(".")[0]


_METHODS, _REFINE = "nmsparse_deploy.find.methods", "nmsparse_deploy.find.refine"
_SPARSEGPT, _ISC = "Frantar & Alistarh 2023, arXiv:2301.00774", "Shao et al. 2023, arXiv:2310.09499"
_MODELOPT = "NVIDIA Model Optimizer 0.47, 2026"

# fmt: off
METHODS = Registry("method", "nmsparse_deploy.methods", MethodEntry, {
    "alps": MethodEntry(
        code=f"{_METHODS}.alps:prune_layer", needs="gram", updates_weights=True,
        summary="ADMM searches the support, least squares its weights", source="Meng et al. 2024, arXiv:2406.07831"),
    "group-obs": MethodEntry(
        code=f"{_METHODS}.group_obs:prune_layer", needs="gram", updates_weights=True, quantises=True,
        summary="SparseGPT's sweep, exact inside each group",
        source="this project, after Kurtic et al. 2022, arXiv:2203.07259"),
    "group-obs-ordered": MethodEntry(
        code=f"{_METHODS}.group_obs_ordered:prune_layer", needs="gram", updates_weights=True,
        summary="group-OBS, the groups that lose most first",
        source="this project, after Frantar et al. 2023, arXiv:2210.17323"),
    "isc": MethodEntry(
        code=f"{_METHODS}.isc:prune_layer", needs="gram", updates_weights=True, scope="columns", quantises=True,
        summary="SparseGPT's sweep, choosing by the sum of OBD and OBS saliencies", source=_ISC),
    "isc-released": MethodEntry(
        code=f"{_METHODS}.isc_released:prune_layer", needs="gram", updates_weights=True, scope="columns",
        quantises=True, summary="ISC with the released code's mixed units, to reproduce it",
        source=f"{_ISC} (released code)"),
    "magnitude": MethodEntry(
        code=f"{_METHODS}.magnitude:scores", needs="none", updates_weights=False, ranks=True, scope="layer",
        summary="largest weights of each group", source="Mishra et al. 2021, arXiv:2104.08378"),
    "magnitude-2d": MethodEntry(
        code=f"{_METHODS}.magnitude_2d:prune_layer", needs="none", updates_weights=False,
        summary="largest weights with the pattern along rows and columns",
        source="NVIDIA apex; Hubara et al. 2021, arXiv:2102.08124"),
    "modelopt-magnitude": MethodEntry(
        code=f"{_METHODS}.modelopt:magnitude", needs="none", updates_weights=False,
        only="2:4", package=("modelopt", "modelopt"),
        summary="ModelOpt's mask by magnitude (2:4 only)", source=_MODELOPT),
    "modelopt-sparsegpt": MethodEntry(
        code=f"{_METHODS}.modelopt:sparsegpt", needs="gram", updates_weights=False,
        only="2:4", package=("modelopt", "modelopt"),
        summary="ModelOpt's SparseGPT mask, original weights (2:4 only)", source=_MODELOPT),
    "proxsparse-local": MethodEntry(
        code=f"{_METHODS}.proxsparse_local:prune_layer", needs="gram", updates_weights=True,
        summary="the regulariser of ProxSparse on the layer's least squares",
        source="Kübler et al. 2025, arXiv:2501.18015"),
    "ria": MethodEntry(
        code=f"{_METHODS}.ria:scores", needs="norms", updates_weights=False, ranks=True, scope="row",
        summary="share of the row and of the column times the root of input norms",
        source="Zhang et al. 2024, ICLR (RIA)"),
    "sparsegpt": MethodEntry(
        code=f"{_METHODS}.sparsegpt:prune_layer", needs="gram", updates_weights=True, scope="columns", quantises=True,
        summary="sweep with weight compensation", source=_SPARSEGPT),
    "sparsegpt-mask": MethodEntry(
        code=f"{_METHODS}.sparsegpt_mask:prune_layer", needs="gram", updates_weights=False, scope="columns",
        summary="SparseGPT's mask on original weights", source=f"{_SPARSEGPT} (mask only)"),
    "sparsegpt-static": MethodEntry(
        code=f"{_METHODS}.sparsegpt_static:scores", needs="gram", updates_weights=False, ranks=True, scope="columns",
        summary="SparseGPT's score on original weights, no sweep", source=f"{_SPARSEGPT} (score only)"),
    "wanda": MethodEntry(
        code=f"{_METHODS}.wanda:scores", needs="norms", updates_weights=False, ranks=True, scope="row",
        summary="weights times input norms", source="Sun et al. 2024, arXiv:2306.11695"),
})

LEARNERS = Registry("learned method", "nmsparse_deploy.learners", LearnerEntry, {
    "maskllm": LearnerEntry(
        code=f"{_METHODS}.maskllm:LEARNED", summary="a distribution over the masks of every group, learned by gradient",
        source="Fang et al. 2024, arXiv:2409.17481"),
    "maskpro": LearnerEntry(
        code=f"{_METHODS}.maskpro:LEARNED", summary="a logit per weight, learned from forward passes alone",
        source="Sun et al. 2025, arXiv:2506.12876"),
    "proxsparse": LearnerEntry(
        code=f"{_METHODS}.proxsparse:LEARNED",
        summary="train a copy towards the pattern with a proximal operator, keep its support",
        source="Liu et al. 2025, arXiv:2502.00258"),
})

REFINEMENTS = Registry("refinement", "nmsparse_deploy.refinements", RefinementEntry, {
    "admm": RefinementEntry(
        code=f"{_REFINE}.admm:refine", level="layer", needs="gram", changes="both",
        summary="weights by ADMM, the mask tightened on the way", source="Boža 2024, arXiv:2401.02938"),
    "bias": RefinementEntry(
        code=f"{_REFINE}.bias:refine", level="block", needs="norms", changes="weights",
        summary="biases absorb the mean of what pruning took", source="Nagel et al. 2019, arXiv:1906.04721"),
    "dsnot": RefinementEntry(
        code=f"{_REFINE}.dsnot:refine", level="layer", needs="norms", changes="mask",
        summary="swaps inside groups that bring each row's mean error to zero",
        source="Zhang et al. 2024, arXiv:2310.08915"),
    "finetune": RefinementEntry(
        code=f"{_REFINE}.finetune:refine", level="model", needs="none", changes="both", unstructured=True,
        summary="train the survivors of the whole model against the dense one",
        source="Zhou et al. 2021, arXiv:2102.04010; Huang et al. 2025, arXiv:2407.20584; Hu et al. 2024, "
               "arXiv:2409.09099"),
    "group-descent": RefinementEntry(
        code=f"{_REFINE}.group_descent:refine", level="layer", needs="gram", changes="mask",
        summary="each group in turn takes the pattern that is best beside its row",
        source="this project, after Zimmer et al. 2025, arXiv:2512.10922"),
    "llm-barber": RefinementEntry(
        code=f"{_REFINE}.llm_barber:refine", level="block", needs="norms", changes="mask", unstructured=True,
        summary="swaps the pairs that a block's loss prices the other way round",
        source="Su et al. 2024, arXiv:2408.10631"),
    "reconstruct": RefinementEntry(
        code=f"{_REFINE}.reconstruct:refine", level="block", needs="norms", changes="weights",
        summary="gradient steps on a block's surviving weights against the dense stream",
        source="Guo et al. 2024, arXiv:2402.12419; Zimmer et al. 2025, arXiv:2510.14444"),
    "refit": RefinementEntry(
        code=f"{_REFINE}.refit:refine", level="layer", needs="gram", changes="weights",
        summary="least squares on the mask, a share of the dense stream in the target",
        source="Meng et al. 2024, arXiv:2406.07831; Li et al. 2025, arXiv:2504.02692"),
    "swap": RefinementEntry(
        code=f"{_REFINE}.swap:refine", level="layer", needs="gram", changes="mask",
        summary="the best exchange of a kept and a pruned weight in every row, repeatedly",
        source="Zimmer et al. 2025, arXiv:2512.10922"),
})

ADAPTERS = Registry("model library", "nmsparse_deploy.adapters", RegistryEntry, {
    "diffusers": RegistryEntry(code="nmsparse_deploy.models.adapters.diffusers:ADAPTER",
                               summary="diffusion transformers", source="diffusers"),
    "timm": RegistryEntry(code="nmsparse_deploy.models.adapters.timm:ADAPTER",
                          summary="vision transformers and convolutional networks", source="timm"),
    "transformers": RegistryEntry(code="nmsparse_deploy.models.adapters.huggingface:ADAPTER",
                                  summary="language models, encoders, vision and speech models",
                                  source="Hugging Face Transformers"),
})

ENGINES = Registry("engine", "nmsparse_deploy.engines", RegistryEntry, {
    "onnxruntime": RegistryEntry(code="nmsparse_deploy.ship.onnx.onnxruntime:OnnxRuntime",
                                 summary="exported graphs on the processor, or dense on a GPU", source="Microsoft"),
    "tensorrt": RegistryEntry(code="nmsparse_deploy.ship.tensorrt.engine:TensorRT",
                              summary="engines with and without sparse weights, with evidence for every layer",
                              source="NVIDIA"),
    "tensorrt-rtx": RegistryEntry(code="nmsparse_deploy.ship.tensorrt.rtx:TensorRtRtx",
                                  summary="whether graphs compile, on any machine", source="NVIDIA"),
    "torch-sparse": RegistryEntry(code="nmsparse_deploy.ship.torch_sparse.engine:TorchSparse",
                                  summary="packed models on PyTorch's cuSPARSELt kernels", source="PyTorch"),
})
# fmt: on


def check_method(name: str) -> str:
    """Return the name of a method, one-shot or learned; raise `UsageError` with the nearest name
    otherwise."""
    if name in METHODS or name in LEARNERS:
        return name
    raise unknown(METHODS.kind, name, sorted([*METHODS.names(), *LEARNERS.names()]))
