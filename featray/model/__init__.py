"""Keras: load a trained model, list its layers, truncate it after selected layers, and run it on arrays.

In: a `ModelConfig` and float32 batches. Out: one float32 array per output. Knows nothing of scans, Ray and
tables. Importing this package does not import TensorFlow.
"""

from featray.model.extractor import Extractor
from featray.model.invariance import InvarianceReport, check_invariance
from featray.model.list_layers import LayerInfo, LayerList, list_layers
from featray.model.model_facts import ModelFacts, OutputLayer

__all__ = [
    "Extractor",
    "InvarianceReport",
    "LayerInfo",
    "LayerList",
    "ModelFacts",
    "OutputLayer",
    "check_invariance",
    "list_layers",
]
