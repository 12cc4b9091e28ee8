"""`featray benchmark`: where the time of a run goes, and how close the run is to the limit of the hardware.

`run.py` joins the parts: it takes a sample of scans or makes phantoms, times each stage in isolation, times
whole runs in fresh processes, and derives efficiency, bottleneck, table, JSON and plot. Import nothing in
this file, because the measured processes import it too.
"""
