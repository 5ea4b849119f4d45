"""Export to ONNX, and the map that ties every pruned weight to its place in the graph.

`export_onnx` traces a cast copy of the module with the dynamo exporter and writes three files:
`NAME.onnx` (graph), `NAME.onnx.data` (weights) and `NAME.link.json` (`LinkMap`). The precision is
cast before tracing, so the graph needs no converter, and every weight in it is proven to be the
parameter bit for bit.
"""

from nmsparse_deploy.ship.onnx.link import LinkMap, LinkRow
from nmsparse_deploy.ship.onnx.prepare import PRECISIONS
from nmsparse_deploy.ship.onnx.trace import ExportResult, TensorSpec, export_onnx

__all__ = ["PRECISIONS", "ExportResult", "LinkMap", "LinkRow", "TensorSpec", "export_onnx"]
