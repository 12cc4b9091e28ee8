"""DICOM: headers to series, and the files of one series to one checked volume."""
