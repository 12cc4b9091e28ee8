"""`featray benchmark`: where a run's time goes, and how near it is to what the hardware allows.

`run.py` joins the parts: a collection is sampled or made, each stage is timed alone, whole runs are timed
in fresh processes, and from both follow efficiency, verdict, table, JSON and plot. This file imports
nothing, for the measured processes start here too.
"""
