"""Read formats other than DICOM (NIfTI, NRRD, MetaImage, NumPy arrays), and zip archives that contain scans.

Readers take the bytes of a file and return a checked `Volume` or array. They must not know paths or storage.
"""
