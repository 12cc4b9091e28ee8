"""The Keras side: load a trained model, list its layers, cut it, run it on arrays.

In: a `ModelConfig` and float32 batches. Out: one float32 array per chosen layer. Knows nothing
of scans, Ray or tables; importing it does not import TensorFlow.
"""

from featray.model.extractor import Extractor, OutputLayer
from featray.model.invariance import InvarianceReport, check_invariance
from featray.model.list_layers import LayerInfo, list_layers

__all__ = ["Extractor", "InvarianceReport", "LayerInfo", "OutputLayer", "check_invariance", "list_layers"]
