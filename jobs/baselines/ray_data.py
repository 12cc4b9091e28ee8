"""Ray Data with batch inference as in its documentation: map decodes, map_batches runs the model in an actor.

python jobs/benchmark.py --baselines ray_data

The benchmark passes one JSON document on stdin, and compares speed and features with those of featray. The
script prints nothing.
"""

from __future__ import annotations

from typing import Any

import common
import ray


class Predictor:
    """One actor, which holds the model."""

    def __init__(self, document: common.Document) -> None:
        self.model = common.load_model(document)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the features of a batch without its volumes."""
        return {"index": batch["index"], **self.model.predict(batch["volume"], verbose=0)}


def main() -> None:
    """Run the pipeline, and save its rows in the order of the files."""
    document = common.read_document()
    files = [{"index": index, "path": path} for index, path in enumerate(document["files"])]
    ray.init(log_to_driver=False)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "volume": common.decode_usual(row["path"], document)}

    rows = (
        ray.data.from_items(files)
        .map(decode)
        .map_batches(
            Predictor,
            fn_constructor_args=[document],
            batch_size=document["batch_size"],
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["index"])
    common.save(
        [{name: value[None] for name, value in row.items() if name != "index"} for row in rows], document
    )


if __name__ == "__main__":
    main()
