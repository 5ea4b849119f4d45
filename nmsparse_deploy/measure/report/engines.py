"""Which kernels the engines run: what every runtime shows of what was built in it."""

from __future__ import annotations

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.registry import ENGINES
from nmsparse_deploy.runs.section import Paragraph, Section
from nmsparse_deploy.ship.engine import BuiltEngine

NOTHING = "No inference engine was built in this run: which kernels would run was not checked here."


def built(row: BuiltEngine) -> Section:
    """Return what the runtime of an engine shows of it; where that is not installed any more, what
    is recorded."""
    try:
        section: Section = ENGINES.load(row.engine).section(row)
    except NmsparseError as error:
        return Section(
            row.path, (Paragraph(row.evidence.verdict, "callout"), Paragraph(error.message, "soft"))
        )
    return section
