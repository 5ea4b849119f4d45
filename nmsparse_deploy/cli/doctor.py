"""`nmsparse-deploy doctor`."""

from nmsparse_deploy.cli.app import output, verb
from nmsparse_deploy.errors import CheckFailed


@verb()
def doctor() -> None:
    """Say what this machine can do, what is missing, what clashes, and what to type next."""
    from nmsparse_deploy.system.doctor import examine, next_command

    findings = examine()
    marks = {"ok": "ok", "missing": "-", "problem": "PROBLEM"}
    output.table(
        {"findings": [f.to_json() for f in findings], "next": next_command(findings)},
        ("", "", "found", "to change it"),
        [(marks[f.state], f.subject, f.found, f.hint) for f in findings],
        [f"next: {next_command(findings)}"],
    )
    if any(f.state == "problem" for f in findings):
        raise CheckFailed("Something needs attention first.", next_command(findings))
