"""The plain loop: nibabel, scipy.ndimage.zoom, model.predict, one table at the end.

python jobs/benchmark.py --baselines loop      (reads its document from stdin)
"""

from __future__ import annotations

import common


def main() -> None:
    """Do one scan after the other."""
    asked = common.given()
    model = common.load_model(asked)
    values = [model.predict(common.decode_usual(path, asked)[None], verbose=0) for path in asked["files"]]
    common.save(values, asked)


if __name__ == "__main__":
    main()
