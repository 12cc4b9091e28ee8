"""Show what an extraction would do and take, from where the cluster sees the data.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/plan.py configs/s3_ct_vae.yaml

Prints counts by state and an estimate from a sample; changes nothing.
"""

import sys

from featray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
