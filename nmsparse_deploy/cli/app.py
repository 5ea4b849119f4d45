"""The Typer app, the one output, and the arguments that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nmsparse_deploy.cli.output import Output

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Find N:M sparsity masks for pretrained transformers, prove them, and ship them.")
output = Output()

Model = Annotated[str, typer.Argument(help="hub name, folder or .gguf file; left out: the demo model")]
Run = Annotated[Path | None, typer.Argument(help="run folder; left out: the newest under runs/")]
Out = Annotated[Path | None, typer.Option(help="run folder [default: runs/MODEL-METHOD-PATTERN]")]
Force = Annotated[bool, typer.Option("--force", help="start over, even if the run is finished")]
Include = Annotated[list[str], typer.Option(help="glob on parameter names to prune; may be repeated")]
Exclude = Annotated[list[str], typer.Option(help="glob on parameter names to leave dense; may be repeated")]
DEMO = "demo"


def version(show: bool) -> None:
    if show:
        from importlib.metadata import version as installed

        print(f"nmsparse-deploy {installed('nmsparse-deploy')}")
        raise typer.Exit


@app.callback()
def options(as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")] = False,
            quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")] = False,
            show_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    others = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    output.as_json, output.quiet, output.answered = as_json and not others, quiet or others, False


def say_default(model: str) -> None:
    if model == DEMO:
        output.message("MODEL left out: using the demo model SmolLM2-135M-Instruct.")
