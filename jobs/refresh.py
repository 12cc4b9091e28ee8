"""Bring an output in step with its collection, on the cluster this job runs on; for a nightly scheduler.

ray job submit --address http://HEAD:8265 --working-dir . -- \
    python jobs/refresh.py configs/s3_ct_vae.yaml [--retry-failed] [--json]

Does nothing, and says so, when nothing has changed. A second one at the same time ends with code 4.
Prints the summary; exits with featray's code, so a scheduler sees what happened.
"""

import sys

from featray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["refresh", "--set", "run.engine=ray", *sys.argv[1:]]))
