"""The scans of a collection, found without reading a voxel: folders, DICOM series, archives, manifest rows.

`featray.stages.list` lists a collection with these modules. `featray.stages.locate` finds the files of the
scans that listing left open. What a scan's voxels say does not belong here.
"""
