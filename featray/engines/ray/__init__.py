"""Engine `ray`: the stages on Ray Data. Besides `featray.output.read_ray`, only this package imports Ray."""
