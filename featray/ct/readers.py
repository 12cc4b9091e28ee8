"""The readers of all formats; their libraries take 0.4 s to import, so only what reads scans imports this."""

from featray.ct import dicom, metaimage, nifti, nrrd

__all__ = ["dicom", "metaimage", "nifti", "nrrd"]
