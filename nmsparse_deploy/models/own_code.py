"""Code that a model's repository brings along (`auto_map`): it is never run, and nobody is asked
whether to run it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmsparse_deploy.errors import UsageError
from nmsparse_deploy.models.hub_cache import cached_folder

DESCRIPTIONS = ("config.json", "tokenizer_config.json")
HINT = "use a checkpoint whose architecture the library has itself"


def without(auto: Any, place: str, **options: Any) -> Any:
    """Load with `auto` (an automatic class of Transformers, or a model's own) and the library's own
    code.

    Raises `UsageError` for what is only to be had by running the repository's.
    """
    try:
        return auto.from_pretrained(place, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise refusal(place, code_file(place, auto.__name__)) from error


def check_architecture(auto: Any, config: Any, architecture: str | None, place: str) -> None:
    """Raise `UsageError` when a config with an `auto_map` is not of an architecture that the
    library has."""
    import transformers

    mapping = getattr(auto, "_model_mapping", None)
    registered = mapping is None or type(config) in mapping
    own = mapping[type(config)].__name__ if registered and mapping is not None else None
    if not registered or not (
        architecture is None or hasattr(transformers, architecture) or architecture == own
    ):
        raise refusal(place, code_file(place, auto.__name__))


def refusal(place: str, file: str | None) -> UsageError:
    """Return the error for a model that needs the code in `file`, which lies in its repository."""
    named = f" ('{file}')" if file else ""
    return UsageError(
        f"'{place}' can only be loaded by code that comes with it{named}, and such code is never run.",
        HINT,
    )


def code_file(place: str, auto: str) -> str | None:
    """Name the file that would be run to load `place` with the class `auto`; OWNER/NAME/FILE if it
    is elsewhere."""
    folder = Path(place) if Path(place).is_dir() else cached_folder(place)
    references: dict[str, Any] = {}
    for description in [folder / name for name in DESCRIPTIONS] if folder is not None else []:
        try:
            given = json.loads(description.read_text(encoding="utf-8")).get("auto_map")
        except (OSError, ValueError, AttributeError):
            continue
        references |= (
            given if isinstance(given, dict) else {"AutoTokenizer": given} if given else {}
        )
    # A configuration that names no class of its own has code for the model.
    reference = references.get(auto) or next(iter(references.values()), None)
    reference = next(filter(None, reference), None) if isinstance(reference, list) else reference
    if not isinstance(reference, str):
        return None
    repository, _, dotted = reference.rpartition("--")
    return "/".join(filter(None, [repository, dotted.rpartition(".")[0].replace(".", "/") + ".py"]))


def diffusers_class(settings: Mapping[str, Any], folder: Path, base: str, what: str) -> Any:
    """Return the class of diffusers, a subclass of its `base`, that the configuration in `folder`
    names.

    Raises `UsageError` for any other, and names the file where the folder brings one along.
    """
    import diffusers

    name = settings.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if inspect.isclass(kind) and issubclass(kind, getattr(diffusers, base)):
        return kind
    file = (
        f"{name[0]}.py" if isinstance(name, list) and name else code_file(str(folder), "AutoModel")
    )
    file = file or next((path.name for path in sorted(folder.glob("*.py"))), None)
    if file is not None:
        raise refusal(str(folder), file)
    raise UsageError(
        f"diffusers {diffusers.__version__} knows no {what} '{name}', which '{folder}' names."
    )
