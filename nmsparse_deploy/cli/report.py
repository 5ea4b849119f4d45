"""`nmsparse-deploy report`."""

from nmsparse_deploy.cli.app import Run, output, verb


@verb(push_to_hub="OWNER/NAME: then publish weights, model card and masks there", private="with --push-to-hub")
def report(run: Run = None, *, push_to_hub: str | None = None, private: bool = False) -> None:
    """Write the report (HTML, Markdown, JSON) and the model card of everything a run holds."""
    from nmsparse_deploy.measure.report.stage import publish
    from nmsparse_deploy.measure.report.stage import report as api
    from nmsparse_deploy.runs.run_dir import RunDir

    opened = RunDir.open(run)
    page = api(opened)
    data = {"html": str(page), "markdown": str(page.with_name("report.md")),
            "json": str(page.with_name("report.json")), "card": str(opened / "model/README.md")}
    if push_to_hub is None:
        output.result(data, [str(page)])
        return
    address = publish(opened, push_to_hub, private, output.progress)
    output.result({**data, "published": address}, [str(page), address])
