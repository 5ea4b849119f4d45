"""The Typer app, the one output, and how a verb is registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from nmsparse_deploy.cli.options import Asked, Fields, field_option, parameter
from nmsparse_deploy.cli.output import Output

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find N:M sparsity masks for pretrained transformers, prove them, and ship them.",
)
output = Output()
VERBS: dict[str, tuple[Callable[..., None], tuple[Fields, ...], dict[str, str]]] = {}

V = TypeVar("V", bound=Callable[..., None])
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")]
Run = Path | None
DEMO = "demo"
HELP = {
    "model": "hub name, folder or .gguf file; left out: the demo model",
    "run": "run folder; left out: the newest under runs/",
    "out": "run folder [default: runs/MODEL-METHOD-PATTERN]",
    "force": "start over, even if the run is finished",
}
"""Of parameters that several verbs share."""


def verb(*groups: Fields, called: str = "", **helps: str) -> Callable[[V], V]:
    """Register a verb, with the help of its parameters; those after `*` become options, the others
    arguments.

    A verb that has options for fields of the recipe takes what was typed of them as `asked`.
    """

    def register(function: V) -> V:
        name = called or function.__name__
        VERBS[name] = function, groups, HELP | helps
        app.command(name, help=function.__doc__)(lambda: None)  # `main_options` fills it in
        return function

    return register


def command(name: str) -> Any:
    """Return the command of a verb with all its options. Making them imports pydantic: only the one
    in use is made."""
    function, groups, helps = VERBS[name]
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "asked"]

    def call(
        ctx: typer.Context, as_json: AsJson = False, quiet: Quiet = False, **values: Any
    ) -> None:
        output.listen(as_json, quiet)
        typed = {
            key: value
            for key, value in values.items()
            if getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"
        }
        asked = {"asked": Asked(groups, typed)} if groups else {}
        function(**asked, **{p.name: values[p.name] for p in own})

    ctx, *shared, _ = inspect.signature(call, eval_str=True).parameters.values()
    every = [
        ctx,
        *(field_option(group, path) for group in groups for path in group.paths.split()),
        *(
            parameter(
                p.name,
                p.annotation,
                p.default,
                helps[p.name],
                positional=p.kind is not p.KEYWORD_ONLY,
            )
            for p in own
        ),
        *shared,
    ]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what Typer reads
        [p.replace(kind=p.KEYWORD_ONLY) for p in every]
    )
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, help=function.__doc__)(call)
    return typer.main.get_command(alone)


def version(show: bool) -> None:
    if show:
        from importlib.metadata import version as installed

        print(f"nmsparse-deploy {installed('nmsparse-deploy')}")
        raise typer.Exit


@app.callback()
def main_options(
    context: typer.Context,
    as_json: AsJson = False,
    quiet: Quiet = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    output.as_json = output.quiet = output.answered = False
    output.listen(as_json, quiet)
    name, group = str(context.invoked_subcommand), context.command  # found, and not parsed yet
    registered, full = group.commands[name], command(name)  # type: ignore[attr-defined]
    registered.params, registered.callback = full.params, full.callback


def say_default(model: str) -> None:
    if model == DEMO:
        output.message("MODEL left out: using the demo model SmolLM2-135M-Instruct.")
