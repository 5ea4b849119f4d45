"""`nmsparse-deploy export`."""

import nmsparse_deploy as nms
from nmsparse_deploy.cli.app import Run, output, verb
from nmsparse_deploy.cli.options import Asked, Fields
from nmsparse_deploy.cli.shapes import planned, shape_lines


@verb(
    Fields("Export", "precisions opset cache scales requantise"),
    Fields("Pack", "rows", note="with --torch: "),
    trt="then build TensorRT engines, see build",
    torch="instead: a PyTorch model without stored zeros; on a GPU each GEMM is timed",
)
def export(asked: Asked, run: Run = None, *, trt: bool = False, torch: bool = False) -> None:
    """Export a run to ONNX, verify each graph, compare it with the model, and compile it with
    TensorRT-RTX if here."""
    from nmsparse_deploy.cli.build import show_engines

    opened = nms.RunDir.open(run)
    ineligible = planned(opened)
    if torch:
        typed = asked.sections["Export"].get("precisions", [])
        low = [name for name in typed if name != "fp32"] or typed
        pack = asked.read(nms.Pack, **({"precisions": low} if low else {}))
        rows = nms.export_torch(opened, pack, output.progress)
        output.result(
            {
                "run": str(opened.path),
                "artefacts": [row.to_json() for row in rows],
                "ineligible_by_shape": ineligible,
            },
            [
                *(line for row in rows for line in row.lines(opened / row.path)),
                *shape_lines(ineligible),
            ],
        )
        return
    spec = asked.read(nms.Export)
    graphs = nms.export(opened, spec, output.progress)
    files = [graph.to_json() for graph in graphs]
    lines = [
        *(line for graph in graphs for line in graph.lines(str(opened / graph.path))),
        graphs[0].size_note,
        *shape_lines(ineligible),
    ]
    if not trt:
        output.result(
            {"run": str(opened.path), "files": files, "ineligible_by_shape": ineligible}, lines
        )
        return
    for line in lines:
        output.message(line)
    low = next((name for name in spec.precisions if name != "fp32"), "fp32")
    show_engines(nms.build(opened, nms.Build(precision=low), output.progress), {"files": files})
