"""`nmsparse-deploy evaluate`."""

import json

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb
from nmsparse_deploy.cli.options import Asked, Fields


@verb(
    Fields(
        "Evaluate",
        "data tokens context continuation images probe size photos drawn steps guidance features onnx "
        "protocols tasks paper_context limit",
    )
)
def evaluate(asked: Asked, run: Run = None) -> None:
    """Compare the dense and the pruned model on held-out data: perplexity, accuracy, similarity or
    denoising."""
    spec = asked.read(nms.Evaluate)
    result = nms.evaluate(nms.RunDir.open(run), spec, output.progress)
    rows = [
        (label, row["metric"], f"{row['value']:.4g} ± {row['standard_error']:.2g}", row["samples"])
        for label, score in result["results"].items()
        for row in (score if isinstance(score, list) else [score])
    ]
    share = result.get("ratio")
    lines = (
        [
            f"pruned / dense: {share['ratio']:.2f} (95 % interval {share['low']:.2f} to {share['high']:.2f}) on the "
            "same samples"
        ]
        if share
        else []
    )
    lines += [f"{label}: {json.dumps(row)}" for label, row in result.get("timm", {}).items()]
    gap = result.get("difference")
    lines += (
        [
            f"{gap['metric']}, pruned - dense: {gap['difference']:+.3f} (95 % interval {gap['low']:+.3f} to "
            f"{gap['high']:+.3f}) on the same samples"
        ]
        if gap
        else []
    )
    output.table(result, ("model", "metric", "value", "samples"), rows, lines)
