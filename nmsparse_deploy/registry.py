"""Names to code, loaded on first use, with a "did you mean" for names that are not there."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from nmsparse_deploy.errors import UsageError


class Registry:
    """A dict of lazy `"module:attribute"` strings; relative to this package."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self.entries = entries

    def names(self) -> list[str]:
        return sorted(self.entries)

    def check(self, name: str) -> str:
        """Return `name` if it is registered; raise `UsageError` with the nearest name otherwise."""
        if name in self.entries:
            return name
        near = difflib.get_close_matches(name, self.entries, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"There is no {self.kind} called '{name}'.{guess}", f"one of: {', '.join(self.names())}")

    def load(self, name: str) -> Any:
        module, attribute = self.entries[self.check(name)].split(":")
        return getattr(import_module(module, __package__), attribute)


METHODS = Registry("method", {
    "alps": ".find.methods.alps:METHOD",
    "group-obs": ".find.methods.group_obs:METHOD",
    "group-obs-ordered": ".find.methods.group_obs_ordered:METHOD",
    "isc": ".find.methods.isc:METHOD",
    "isc-released": ".find.methods.isc_released:METHOD",
    "magnitude": ".find.methods.magnitude:METHOD",
    "magnitude-2d": ".find.methods.magnitude_2d:METHOD",
    "modelopt-magnitude": ".find.methods.modelopt:MAGNITUDE",
    "modelopt-sparsegpt": ".find.methods.modelopt:SPARSEGPT",
    "proxsparse-local": ".find.methods.proxsparse_local:METHOD",
    "ria": ".find.methods.ria:METHOD",
    "sparsegpt": ".find.methods.sparsegpt:METHOD",
    "sparsegpt-mask": ".find.methods.sparsegpt_mask:METHOD",
    "sparsegpt-static": ".find.methods.sparsegpt_static:METHOD",
    "wanda": ".find.methods.wanda:METHOD",
})

LEARNERS = Registry("learned method", {
    "maskllm": ".find.methods.maskllm:LEARNED",
    "maskpro": ".find.methods.maskpro:LEARNED",
    "proxsparse": ".find.methods.proxsparse:LEARNED",
})

REFINEMENTS = Registry("refinement", {
    "admm": ".find.refine.admm:REFINEMENT",
    "bias": ".find.refine.bias:REFINEMENT",
    "dsnot": ".find.refine.dsnot:REFINEMENT",
    "finetune": ".find.refine.finetune:REFINEMENT",
    "group-descent": ".find.refine.group_descent:REFINEMENT",
    "llm-barber": ".find.refine.llm_barber:REFINEMENT",
    "reconstruct": ".find.refine.reconstruct:REFINEMENT",
    "refit": ".find.refine.refit:REFINEMENT",
    "swap": ".find.refine.swap:REFINEMENT",
})

ADAPTERS = Registry("model library", {
    "diffusers": ".models.adapters.diffusers:ADAPTER",
    "timm": ".models.adapters.timm:ADAPTER",
    "transformers": ".models.adapters.huggingface:ADAPTER",
})


def check_method(name: str) -> str:
    """Return the name of a method, one-shot or learned; raise `UsageError` with the nearest name otherwise."""
    return Registry(METHODS.kind, METHODS.entries | LEARNERS.entries).check(name)
