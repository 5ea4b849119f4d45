"""Names to code, loaded on first use, with a "did you mean" for names that are not there."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from .errors import UsageError


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
    "alps": ".methods.alps:METHOD",
    "group-obs": ".methods.group_obs:METHOD",
    "group-obs-ordered": ".methods.group_obs_ordered:METHOD",
    "isc": ".methods.isc:METHOD",
    "isc-released": ".methods.isc_released:METHOD",
    "magnitude": ".methods.magnitude:METHOD",
    "magnitude-2d": ".methods.magnitude_2d:METHOD",
    "modelopt-magnitude": ".methods.modelopt:MAGNITUDE",
    "modelopt-sparsegpt": ".methods.modelopt:SPARSEGPT",
    "proxsparse-local": ".methods.proxsparse_local:METHOD",
    "ria": ".methods.ria:METHOD",
    "sparsegpt": ".methods.sparsegpt:METHOD",
    "sparsegpt-mask": ".methods.sparsegpt_mask:METHOD",
    "sparsegpt-static": ".methods.sparsegpt_static:METHOD",
    "wanda": ".methods.wanda:METHOD",
})

LEARNERS = Registry("learned method", {
    "maskllm": ".methods.maskllm:LEARNED",
    "maskpro": ".methods.maskpro:LEARNED",
    "proxsparse": ".methods.proxsparse:LEARNED",
})

REFINEMENTS = Registry("refinement", {
    "admm": ".refine.admm:REFINEMENT",
    "bias": ".refine.bias:REFINEMENT",
    "dsnot": ".refine.dsnot:REFINEMENT",
    "finetune": ".refine.finetune:REFINEMENT",
    "group-descent": ".refine.group_descent:REFINEMENT",
    "llm-barber": ".refine.llm_barber:REFINEMENT",
    "reconstruct": ".refine.reconstruct:REFINEMENT",
    "refit": ".refine.refit:REFINEMENT",
    "swap": ".refine.swap:REFINEMENT",
})


def check_method(name: str) -> str:
    """Return the name of a method, one-shot or learned; raise `UsageError` with the nearest name otherwise."""
    return Registry(METHODS.kind, METHODS.entries | LEARNERS.entries).check(name)
