"""DICOM: group the files of a collection into scans by their headers, and read one scan into a Volume."""
