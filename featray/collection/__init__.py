"""What a collection holds, found without reading a voxel: places, DICOM series, archives, manifest rows.

`featray.stages.list` joins the parts; `featray.stages.decode` uses `rows.locate` for what listing left open.
"""
