"""Estimate the work, time and memory of an extraction, on a cluster machine that can read the data.

python jobs/submit.py --address http://HEAD:8265 --working-dir . -- \
    python jobs/plan.py configs/s3_ct_vae.yaml

Takes the arguments of `featray plan`. Prints the number of scans by state, and an estimate of time, memory
and output size from a sample, for the nodes that the cluster has at present. Changes nothing.
"""

import sys

from featray.cli.main import console

if __name__ == "__main__":
    console(["plan", "--set", "run.engine=ray", *sys.argv[1:]])
