"""Prune a model, check every group of the saved weights, and compare the pruned model with the
dense one.

python examples/prune_and_verify.py                                        # the demo model, on packaged text
python examples/prune_and_verify.py MODEL --data train.txt --held-out test.txt --out runs/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nmsparse_deploy as nms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="hub name, folder or .gguf file")
    parser.add_argument("--data", default="wikipedia", help="calibration text")
    parser.add_argument("--held-out", default="bbc", help="text to compare the two models on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens per sample")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    options = parser.parse_args()

    spec = nms.Prune(
        method="wanda",
        pattern="2:4",
        calibration=nms.Calibration(
            data=options.data, samples=options.samples, length=options.length
        ),
    )
    run = nms.prune(options.model, spec, options.out)

    for report in nms.verify(run):
        print(f"{report.artefact}: {report.checked} tensors checked, {report.failed} failed")
        assert report.ok, report.failures()

    nms.evaluate(
        run, nms.Evaluate(data=options.held_out, tokens=16 * options.length, context=options.length)
    )
    print(f"perplexity of both models and every detail: {nms.report(run)}")


if __name__ == "__main__":
    main()
