"""The scans of a collection, found without reading a voxel: folders, DICOM series, archives, manifest rows.

`featray.stages.list` lists a collection with these modules. `featray.stages.locate` finds the files of the
scans that listing left open. Code that reads voxels does not belong here.
"""
