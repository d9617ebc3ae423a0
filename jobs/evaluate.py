r"""raybrats evaluate as a job.

ray job submit --working-dir . -- python jobs/evaluate.py s3://bucket/predictions s3://bucket/cohort.parquet
"""

import sys

from raybrats.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
