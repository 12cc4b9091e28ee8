"""Write the report of an output, on the Ray cluster that runs this job.

python jobs/submit.py --address http://HEAD:8265 --working-dir . -- \
    python jobs/report.py configs/s3_ct_vae.yaml --labels s3://bucket/labels.csv [--json]

Takes the arguments of `featray report`. The report is computed by this one process, without Ray tasks: it
reads the features twice, and compares samples of them. The exit code is that of `featray report`.
"""

import sys

from featray.cli.main import console

if __name__ == "__main__":
    console(["report", *sys.argv[1:]])
