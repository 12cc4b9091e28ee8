"""Find the scans of a collection without reading a voxel: in folders, DICOM series, archives and manifests.

`featray.stages.list` lists a collection with these modules. `featray.stages.locate` uses them to find the
files of the scans that listing left open. Code that reads voxels does not belong here.
"""
