"""Load a trained Keras model from any kind of file, with a sha256 of everything that made it."""
