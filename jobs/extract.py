"""Extract what is missing, on the cluster this job runs on.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/extract.py configs/s3_ct_vae.yaml [--set run.actors.max=8] [--json]

Prints the summary; exits with featray's code, so a scheduler sees what happened.
"""

import sys

from featray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["extract", "--set", "run.engine=ray", *sys.argv[1:]]))
