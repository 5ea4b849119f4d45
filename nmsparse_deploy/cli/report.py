"""`nmsparse-deploy report`."""

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb


@verb(
    push_to_hub="OWNER/NAME: then publish weights, model card and masks there",
    private="with --push-to-hub",
)
def report(run: Run = None, *, push_to_hub: str | None = None, private: bool = False) -> None:
    """Write the report (HTML, Markdown, JSON) and the model card of everything a run holds."""
    opened = nms.RunDir.open(run)
    page = nms.report(opened)
    data = {
        "html": str(page),
        "markdown": str(page.with_name("report.md")),
        "json": str(page.with_name("report.json")),
        "card": str(opened / "model/README.md"),
    }
    if push_to_hub is None:
        output.result(data, [str(page)])
        return
    address = nms.publish(opened, push_to_hub, private, output.progress)
    output.result({**data, "published": address}, [str(page), address])
