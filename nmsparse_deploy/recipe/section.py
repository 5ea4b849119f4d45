"""What every section of a recipe is, and sections whose fields depend on a name that a plug-in may
have registered."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetPydanticSchema
from pydantic_core import CoreSchema, core_schema

from nmsparse_deploy.registry import LearnerEntry, RefinementEntry, Registry, load


class Frozen(BaseModel):
    """Part of a recipe: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def one_of(
    own: Any, registry: Registry[LearnerEntry] | Registry[RefinementEntry], base: type[Frozen]
) -> GetPydanticSchema:
    """Return the schema of `own`, a union of our sections that `name` tells apart, and of what
    plug-ins registered.

    The class of a plug-in's section, a `base`, is imported when a recipe names it.
    """

    def validate(value: Any, ours: core_schema.ValidatorFunctionWrapHandler) -> Any:
        name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
        if not isinstance(name, str) or name in registry.own or name not in registry:
            return ours(value)
        path = registry[name].settings
        with registry.blamed(name):
            section = load(path) if path else base
            if not (isinstance(section, type) and issubclass(section, base)):
                raise TypeError(f"{path} is no {base.__name__}")
        return section.model_validate(value)

    def schema(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(validate, handler(own))

    return GetPydanticSchema(schema)
