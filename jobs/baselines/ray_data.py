"""Ray Data as its documentation shows batch inference: map to decode, map_batches with a class for the model.

python jobs/benchmark.py --baselines ray_data      (reads its document from stdin)
"""

from __future__ import annotations

from typing import Any

import common
import ray


class Predictor:
    """The model of one actor."""

    def __init__(self, asked: common.Given) -> None:
        self.model = common.load_model(asked)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the features to a batch and drop its volumes."""
        return {"at": batch["at"], **self.model.predict(batch["volume"], verbose=0)}


def main() -> None:
    """Build the pipeline, collect its rows, put them back into order."""
    asked = common.given()
    files = [{"at": at, "path": path} for at, path in enumerate(asked["files"])]
    ray.init(log_to_driver=False)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"at": row["at"], "volume": common.decode_usual(row["path"], asked)}

    rows = (
        ray.data.from_items(files)
        .map(decode)
        .map_batches(
            Predictor,
            fn_constructor_args=[asked],
            batch_size=asked["batch_size"],
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["at"])
    common.save([{name: value[None] for name, value in row.items() if name != "at"} for row in rows], asked)


if __name__ == "__main__":
    main()
