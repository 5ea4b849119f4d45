"""Two-block models of every family through the whole chain; writes results/families.json.

`python -m benchmarks.families [NAME ...]` (about six minutes on one free core); names run a part
and print it only.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.files import write_json
from nmsparse_deploy.system.environment import environment, now
from tests.fixtures import torchvision_cpu  # noqa: F401 - before anything looks for torchvision

RESULT = Path(__file__).parent.parent / "results/families.json"


def main(names: list[str]) -> None:
    from tests.fixtures import pico
    from tests.fixtures import small_vision as small
    from tests.fixtures.family_check import COLUMNS, check
    from tests.fixtures.zoo import FAMILIES

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = {
            "text": pico.text(folder, "calibration.txt", 1),
            "pictures": small.labelled(folder / "pictures"),
        }
        data["both"] = f"{data['pictures']}+{data['text']}"
        for number, name in enumerate(names or FAMILIES):
            (folder / str(number)).mkdir()
            rows[name] = check(name, folder / str(number), data)
            print(name, rows[name], file=sys.stderr, flush=True)
    if not names:
        settings = "random weights, two blocks, 8 calibration samples, export fp16 opset 20"
        result = {
            "command": "python -m benchmarks.families",
            "date": now(),
            "settings": settings,
            "columns": list(COLUMNS),
            **environment(),
            "families": {
                name: {column: row[column] for column in COLUMNS} for name, row in rows.items()
            },
        }
        write_json(RESULT, result)


if __name__ == "__main__":
    main(sys.argv[1:])
