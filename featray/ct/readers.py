"""The readers of all formats; their libraries take 0.4 s to import, so only what reads scans imports this.

What `dicom` imports for some files only is here as well: pydicom comes with nibabel anyway, and where it
cannot be imported, that shows before a scan is read.
"""

from featray.ct.dicom import read as dicom
from featray.ct.formats import metaimage, nifti, nrrd

__all__ = ["dicom", "dicom_compressed", "dicom_frames", "dicom_tags", "metaimage", "nifti", "nrrd"]
