"""The section `prune:` of a recipe: how the mask is found, and how the weights that stay are
refined."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.pattern import Pattern, Unstructured, parse_pattern
from nmsparse_deploy.recipe.calibration import Calibration
from nmsparse_deploy.recipe.learn_settings import AnyLearn
from nmsparse_deploy.recipe.refine_steps import AnyStep, Finetune, Refit
from nmsparse_deploy.recipe.section import Frozen
from nmsparse_deploy.registry import LEARNERS, METHODS, NEEDS, REFINEMENTS, Need, check_method


class Prune(Frozen):
    """The way a mask is found, and the weights that stay are refined."""

    method: str = Field(
        "sparsegpt", description="how the mask is found, see `nmsparse-deploy list`"
    )
    pattern: str = Field("2:4", description="keep:group, or unstructured:SHARE_OF_ZEROS")
    permute: bool = Field(
        False, description="first reorder the channels that are free to move, for better groups"
    )
    calibration: Calibration = Calibration()
    wbits: Literal[4, 8] | None = Field(None, description="round kept weights to this many bits")
    wgroup: int | None = Field(
        None, ge=1, description="columns that share a scale, with wbits; left out: a whole row"
    )
    learn: AnyLearn | None = Field(
        None, description="settings of a learned method; filled in when there is one"
    )
    refine: tuple[AnyStep, ...] = Field(
        (), description="applied in order after the mask is chosen, see `nmsparse-deploy list`"
    )
    sequential: bool = Field(
        False,
        description="statistics of a layer see the pruned ones before it in its block; "
        "about twice the forward passes",
    )
    include: tuple[str, ...] = Field(
        (), description="globs on parameter names to prune; none: everything prunable"
    )
    exclude: tuple[str, ...] = Field((), description="globs on parameter names to leave dense")
    patterns: dict[str, str] | None = Field(
        None,
        description="parameter name -> keep:group, dense, or dense: why; "
        "what is not named gets `pattern`",
    )
    compute: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="dtype of forward passes; statistics are fp32"
    )

    @model_validator(mode="before")
    @classmethod
    def _section_of_the_method(cls, data: Any) -> Any:
        """Fill in `learn` whenever the method learns, and the method's name in it."""
        if not isinstance(data, dict):
            return data
        method, section = data.get("method"), data.get("learn")
        if method not in LEARNERS:
            if section is not None:
                name = method or cls.model_fields["method"].default
                raise UsageError(
                    f"The section learn belongs to a learned method, and '{name}' is none.",
                    f"one of: {', '.join(LEARNERS.names())}",
                )
            return data
        if section is None or (isinstance(section, dict) and "name" not in section):
            return {**data, "learn": {"name": method, **(section or {})}}
        return data

    @property
    def finetune(self) -> Finetune | None:
        """The step that trains the whole model, if there is one."""
        return next((step for step in self.refine if isinstance(step, Finetune)), None)

    @property
    def walked(self) -> int:
        """Calibration samples that pass from block to block; what trains the whole model reads all
        of them."""
        samples = self.calibration.samples
        return min(self.finetune.prior_samples or samples, samples) if self.finetune else samples

    @property
    def rounds_last(self) -> bool:
        """Whether `wbits` takes a sweep of its own on the finished mask, as the method's is not the
        last word."""
        return self.wbits is not None and (bool(self.refine) or not METHODS[self.method].quantises)

    @property
    def dense_stream(self) -> bool:
        """Whether a refinement looks at what the dense model computes beside the pruned one."""
        return any(step.dense_stream for step in self.refine)

    @property
    def one_shot_method(self) -> str:
        """The method that scores layers: the recipe's own, or the first prior of a learned one."""
        return (
            self.method if self.learn is None else next(iter(self.learn.prior_methods), "magnitude")
        )

    @property
    def needs(self) -> Need:
        """The statistics that the method and the refinements ask for together.

        Learning a block at a time asks for what its priors need; learning the whole model is done
        before the walk.
        """
        asked: set[Need] = {"none", *(REFINEMENTS[step.name].needs for step in self.refine)}
        if self.learn is None:
            asked.add(METHODS[self.method].needs)
        elif self.learn.scope == "block":
            asked |= {"norms", *(METHODS[name].needs for name in self.learn.prior_methods)}
        if self.permute:
            asked.add("norms")
        if self.wbits:
            asked.add("gram")
        return max(asked, key=NEEDS.index)

    @property
    def whole_model(self) -> str | None:
        """The part of the recipe that looks at more than one block at a time, as a message names
        it."""
        if self.finetune is not None:
            return "finetune"
        if self.learn is not None and (self.learn.scope == "global" or self.learn.prior_files):
            return "Learning through the whole model, or from mask files,"
        looks_on = next((step for step in self.refine if step.outlook(1)), None)
        return f"{looks_on.name} with an outlook on the model's output" if looks_on else None

    def settled(self, *, gpu: bool) -> Self:
        """Return the same recipe with what it leaves open decided, for a machine with or without a
        GPU.

        `objective: auto` is the whole model where there is a GPU and channels stay where they are,
        else a block at a time. The identity of a run (`fingerprint`) is that of the recipe as
        asked.
        """
        if self.learn is None:
            return self
        objective = self.learn.objective
        if objective == "auto":
            objective = "global" if gpu and not self.permute else "block"
        return self.model_copy(update={"learn": self.learn.settled(objective)})

    @field_validator("patterns")
    @classmethod
    def _valid_patterns(cls, named: dict[str, str] | None) -> dict[str, str] | None:
        for text in (named or {}).values():
            decided(text)
        return named

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name in REFINEMENTS:
            raise UsageError(f"'{name}' refines a mask; type --method wanda --refine {name}.")
        return check_method(name)

    @field_validator("refine", mode="before")
    @classmethod
    def _known_refinements(cls, steps: Any) -> Any:
        for step in steps if isinstance(steps, (list, tuple)) else ():
            if isinstance(step, dict):
                REFINEMENTS.check(str(step.get("name")))
        return steps

    @field_validator("pattern")
    @classmethod
    def _valid_pattern(cls, text: str) -> str:
        return str(parse_pattern(text))

    @model_validator(mode="after")
    def _finds_the_pattern(self) -> Prune:
        """Refuse patterns that the method or a refinement does not know, before anything is
        loaded."""
        only = METHODS[self.method].only if self.method in METHODS else None
        other = next((pattern for pattern in self._every_pattern() if str(pattern) != only), None)
        if only and other is not None:
            raise UsageError(f"The method '{self.method}' finds {only} masks only, not {other}.")
        if (unstructured := self._unstructured()) is not None:
            methods = {name: bool(entry.scope) for name, entry in METHODS.readable()[0].items()}
            _refuse_others("method", [self.method], methods, unstructured)
            steps = {
                name: entry.changes == "weights" or entry.unstructured
                for name, entry in REFINEMENTS.readable()[0].items()
            }
            _refuse_others("refinement", [step.name for step in self.refine], steps, unstructured)
            if self.permute:
                raise UsageError(
                    f"Permuting channels makes better groups, and {unstructured} has none.",
                    "leave out --permute",
                )
        return self

    def _every_pattern(self) -> list[Pattern]:
        named = [decided(text)[0] for text in (self.patterns or {}).values()]
        return [pattern for pattern in (parse_pattern(self.pattern), *named) if pattern is not None]

    def _unstructured(self) -> Unstructured | None:
        return next(
            (pattern for pattern in self._every_pattern() if isinstance(pattern, Unstructured)),
            None,
        )

    @model_validator(mode="after")
    def _whole_model_last(self) -> Prune:
        """Refuse what trains the whole model anywhere but at the end, and whatever does not go with
        it."""
        for step in self.refine:
            with REFINEMENTS.blamed(step.name):
                if REFINEMENTS[step.name].level == "model" and not isinstance(step, Finetune):
                    raise TypeError(
                        f"{type(step).__name__} is no Finetune, as the level 'model' asks"
                    )
        if any(isinstance(step, Finetune) for step in self.refine[:-1]):
            raise UsageError(
                "finetune trains the whole pruned model; it comes once, after all other refinements."
            )
        last = self.finetune
        if last is not None and last.batch is not None and last.batch % self.calibration.batch:
            raise UsageError(
                f"finetune's batch {last.batch} is not a multiple of calibration.batch "
                f"{self.calibration.batch}, the samples that pass at a time."
            )
        if last is not None and last.moves_mask:
            if self._unstructured() is not None:
                raise UsageError(
                    f"finetune with {last.how} chooses within groups, and the pattern has none.",
                    "how: fixed",
                )
            if self.permute:
                raise UsageError(
                    f"finetune with {last.how} brings back dense weights, which permuting moves.",
                    "how: fixed, or leave out --permute",
                )
        return self

    @model_validator(mode="after")
    def _can_be_learned(self) -> Prune:
        if self.learn is None:
            return self
        if self.learn.name != self.method:
            raise UsageError(
                f"The section learn is that of '{self.learn.name}', the method is '{self.method}'."
            )
        if self.learn.batch is not None and self.learn.batch % self.calibration.batch:
            raise UsageError(
                f"learn.batch {self.learn.batch} is not a multiple of calibration.batch "
                f"{self.calibration.batch}, the samples that pass at a time."
            )
        if self.permute and self.learn.objective == "global":
            raise UsageError(
                "Permuted channels are learned a block at a time.", "--objective block"
            )
        if self.permute and self.learn.prior_files:
            raise UsageError(
                "A mask file does not fit channels in another order.", "leave out --permute"
            )
        return self

    @model_validator(mode="after")
    def _can_be_rounded(self) -> Prune:
        if self.wbits is None:
            if self.wgroup is not None:
                raise UsageError(
                    f"wgroup {self.wgroup} shares the scales of wbits, which is not set.",
                    "--wbits 4",
                )
            return self
        if self.learn is not None:
            raise UsageError(
                f"A mask that '{self.method}' learned is not rounded to {self.wbits} bits here.",
                "leave out --wbits, and round at export with --precision int8 or fp8",
            )
        if self.finetune:
            raise UsageError(
                f"'{self.finetune.name}' would move weights off the {self.wbits}-bit grid; leave out "
                "--refine or --wbits."
            )
        unit = parse_pattern(self.pattern).block_size
        if self.wgroup is not None and self.wgroup % unit:
            raise UsageError(
                f"wgroup {self.wgroup} is not a multiple of {unit}, the columns pruned at a time."
            )
        return self


def _refuse_others(kind: str, asked: list[str], able: dict[str, bool], pattern: Pattern) -> None:
    for name in asked:
        if not able.get(name):
            others = " or ".join(other for other in able if able[other])
            raise UsageError(
                f"The {kind} '{name}' works in N:M groups only; for {pattern} take {others}."
            )


DENSE = "dense"


def decided(text: str) -> tuple[Pattern | None, str]:
    """Return what a value of `Prune.patterns` says: a pattern (None = dense), and why. Raises
    `UsageError`."""
    head, _, why = text.partition(":")
    return (None, why.strip()) if head.strip() == DENSE else (parse_pattern(text), "")


CLOSED_FORM = Prune(method="group-obs", refine=(Refit(),), sequential=True)
"""Recommended where nothing else is asked for: no back-propagation, minutes for a small model
(docs/methods.md)."""
