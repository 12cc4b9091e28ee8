"""Update an output to the present state of its collection, on the Ray cluster that runs this job.

python jobs/submit.py --address http://HEAD:8265 --working-dir . -- \
    python jobs/refresh.py configs/s3_ct_vae.yaml [--retry-failed] [--json]

Meant for a nightly scheduler. Takes the arguments of `featray refresh`. Prints the summary, also if nothing
has changed. The exit code is that of `featray refresh`: 4, for example, if another run holds the output.
"""

import sys

from featray.cli.main import console

if __name__ == "__main__":
    console(["refresh", "--set", "run.engine=ray", *sys.argv[1:]])
