"""Why Transformers did not load a model, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nmsparse_deploy.errors import NmsparseError, UsageError, first_line
from nmsparse_deploy.models.hub_errors import causes, hub_error


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Put whatever fails here while `source` is loaded into one sentence."""
    try:
        yield
    except NmsparseError:
        raise
    except Exception as error:
        raise explain(error, source) from error


def explain(error: Exception, source: str) -> NmsparseError:
    """Put the many ways in which loading fails into one sentence."""
    from safetensors import SafetensorError

    if refused := hub_error(
        error, source, "give a local folder, or leave MODEL out to use the demo model"
    ):
        return refused
    if any(isinstance(e, SafetensorError) for e in causes(error)):
        return UsageError(
            f"The weights of '{source}' are damaged or truncated: {first_line(causes(error)[-1])}."
        )
    if isinstance(error, (OSError, ValueError, KeyError, ImportError, RuntimeError)):
        line = first_line(error)
        hint = (
            f"diffusers:{source} if it is a pipeline of diffusers"
            if "config.json" in line
            else None
        )
        return UsageError(f"'{source}' cannot be loaded as a model: {line}.", hint)
    return NmsparseError(
        f"'{source}' cannot be loaded: {type(error).__name__}: {first_line(error)}."
    )
