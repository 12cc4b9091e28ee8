"""The readers of all formats, imported together.

Their libraries take 0.4 s to import, so only processes that read scans import this module. The modules that
`read_series` needs for some files only are imported here as well: a library that cannot be imported then
shows before a scan is read, and no scan is blamed for it.
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
