"""Readers of single-file formats: NIfTI, NRRD, MetaImage, NumPy arrays, and zip archives that hold them."""
