"""`nmsparse-deploy proof` with two more parts, on a machine that may lack packages and a network:
`make gpu-proof`.

What the machine lacks comes from `gpu-bundle/` (`make gpu-bundle`), where that is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.bundle import BUNDLE, ROOT, BundleError, use


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on a processor, measuring nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results/gpu", help="folder of the result"
    )
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--only", action="append", default=[], help="a part; may be repeated")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        try:
            use(given.bundle, Path(work))
            from nmsparse_deploy.errors import NmsparseError
            from nmsparse_deploy.measure.proof.record import ProofRecord
            from nmsparse_deploy.measure.proof.run import Part, prove

            extra = {
                "learning": Part(55, "benchmarks.gpu.step"),
                "tests": Part(60, "benchmarks.gpu.step"),
            }
            try:
                path = prove(
                    given.out,
                    given.dry,
                    given.only,
                    extra=extra,
                    progress=lambda text, *_: print(text, file=sys.stderr, flush=True),
                )
            except NmsparseError as error:
                raise BundleError(error.message) from error
        except BundleError as error:
            print(f"gpu-proof: {error}", file=sys.stderr)
            return 1
    print(path)
    return 0 if ProofRecord.load(path).complete else 1


if __name__ == "__main__":
    sys.exit(main())
