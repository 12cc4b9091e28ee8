"""CT in plain NumPy: reading, geometry, intensities, resampling. Knows neither Ray nor Keras.

One form everywhere: voxels in Hounsfield units with axes (z, y, x); one frame, LPS in mm
(x grows to the patient's Left, y to Posterior, z to Superior, as in DICOM).
"""
