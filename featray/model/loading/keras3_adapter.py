"""Use custom layers that are written for Keras 3 in a model of Keras 2.

In: a class of Keras 3. Out: a class of Keras 2 with the same weights, which calls a layer of the first class.
Importing this module imports Keras 3, Keras 2 and TensorFlow.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
import tf_keras


def adapt_layer_class(layer_class: Any) -> Any:
    """Return a class of Keras 2 layers with the same computation as layers of `layer_class`."""
    return type(layer_class.__name__, (_AdaptedLayer,), {"layer_class": layer_class})


class _AdaptedLayer(tf_keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """A layer of Keras 2 that runs one layer of Keras 3.

    Attributes:
        layer_class: The class of the layer of Keras 3.
    """

    layer_class: Any

    def __init__(self, **config: Any) -> None:
        """Make the layer of Keras 3 from its config in the file."""
        super().__init__(name=config.get("name"), trainable=config.get("trainable", True))
        self._holder = _Holder(self.layer_class.from_config(config))
        # Bypasses the replacement of `__call__` while a model is traced, so that the layer appears once.
        self._call_adapted = keras.layers.Layer.__call__

    @property
    def adapted(self) -> Any:
        """The layer of Keras 3."""
        return self._holder.layer

    @property
    def trainable_weights(self) -> list[Any]:
        """The variables of the layer of Keras 3 that training changes."""
        return [weight.value for weight in self.adapted.trainable_weights]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """The other variables of the layer of Keras 3."""
        return [weight.value for weight in self.adapted.non_trainable_weights]

    def build(self, input_shape: Any) -> None:
        """Create the variables of the layer of Keras 3 by a symbolic call."""
        with tf.init_scope():
            if not self.adapted.built:
                self.adapted(tf.nest.map_structure(_make_symbolic, _list_shapes(input_shape)))
        super().build(input_shape)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer of Keras 3."""
        return self._call_adapted(self.adapted, *args, **kwargs)

    def compute_mask(self, _inputs: Any, mask: Any = None) -> Any:
        """Return the mask of the inputs."""
        return mask


class _Holder:
    """Hides a layer of Keras 3 from Keras 2, which tracks every attribute that it recognizes."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer


def _list_shapes(input_shape: Any) -> Any:
    """Return the shapes of the inputs as `tf.TensorShape`, which `tf.nest` does not take apart."""
    if isinstance(input_shape, list):
        return [_list_shapes(shape) for shape in input_shape]
    return tf.TensorShape(input_shape)


def _make_symbolic(shape: Any) -> Any:
    return keras.KerasTensor(tuple(shape), "float32")
