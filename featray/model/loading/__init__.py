"""Load a trained Keras model from a file of any kind, with the sha256 of every file that it is made from."""
