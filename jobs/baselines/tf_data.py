"""A tf.data pipeline: a parallel map with a Python decoder, batches, prefetch, and one call of predict.

python jobs/benchmark.py --baselines tf_data

The benchmark passes one JSON document on stdin, and compares speed and features with those of featray. The
script prints nothing.
"""

from __future__ import annotations

import common
import tensorflow as tf


def main() -> None:
    """Run the model while tf.data decodes in parallel."""
    document = common.read_document()
    model = common.load_model(document)

    def decode(path: tf.Tensor) -> tf.Tensor:
        volume = tf.numpy_function(
            lambda name: common.decode_usual(name.decode(), document), [path], tf.float32
        )
        return tf.ensure_shape(volume, (*document["size"], 1))

    volumes = (
        tf.data.Dataset.from_tensor_slices(document["files"])
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(document["batch_size"])
        .prefetch(tf.data.AUTOTUNE)
    )
    common.save([model.predict(volumes, verbose=0)], document)


if __name__ == "__main__":
    main()
