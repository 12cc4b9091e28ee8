"""Extract the missing features of a collection, on the Ray cluster that runs this job.

python jobs/submit.py --address http://HEAD:8265 --working-dir . -- \
    python jobs/extract.py configs/s3_ct_vae.yaml [--set run.actors.max=8] [--json]

Takes the arguments of `featray extract`. Prints the summary; the exit code is that of `featray extract`, so
that a scheduler sees whether the run succeeded.
"""

import sys

from featray.cli.main import console

if __name__ == "__main__":
    console(["extract", "--set", "run.engine=ray", *sys.argv[1:]])
