"""A model that is loaded and traced in half a second, for tests that run featray many times."""

from __future__ import annotations

from pathlib import Path


def save_small_model(path: Path, seed: int) -> Path:
    """Save a model of volumes (8, 32, 32) with the layers conv_1, conv_2, mean and z_mean; return the path.

    Args:
        path: A .keras file.
        seed: Decides the weights.
    """
    import keras

    keras.utils.set_random_seed(seed)
    volume = keras.Input((8, 32, 32, 1))
    maps = keras.layers.Conv3D(2, 3, strides=2, padding="same", activation="relu", name="conv_1")(volume)
    maps = keras.layers.Conv3D(3, 3, strides=2, padding="same", activation="relu", name="conv_2")(maps)
    mean = keras.layers.GlobalAveragePooling3D(name="mean")(maps)
    keras.Model(volume, keras.layers.Dense(4, name="z_mean")(mean)).save(path)
    return path
