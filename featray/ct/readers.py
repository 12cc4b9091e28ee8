"""Import the readers of all CT formats together.

The libraries of the readers take 0.4 s to import, so only processes that read scans import this module. It
also imports the modules that `read_series` needs for some files only. A library that cannot be imported then
fails before the first scan is read, and the failure is not attributed to a scan.
"""

from featray.ct.dicom import decompress, multiframe, tags
from featray.ct.dicom.read import read_series
from featray.ct.formats.metaimage import read_metaimage
from featray.ct.formats.nifti import read_nifti, read_nifti_pair
from featray.ct.formats.nrrd import read_nrrd

__all__ = [
    "decompress",
    "multiframe",
    "read_metaimage",
    "read_nifti",
    "read_nifti_pair",
    "read_nrrd",
    "read_series",
    "tags",
]
