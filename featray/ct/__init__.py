"""Read CT scans and change their geometry, with NumPy: formats, affines, intensities, resampling.

Voxels are Hounsfield units with axes (z, y, x). Positions are LPS in mm: x grows to the patient's Left, y to
Posterior, z to Superior, as in DICOM. This package imports only itself and `featray.errors`: it must not know
the configuration, storage, Ray or Keras.
"""
