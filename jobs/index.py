r"""raybrats index as a job.

ray job submit --working-dir . -- python jobs/index.py s3://bucket/BraTS2020 \
        --out s3://bucket/cohort.parquet
"""

import sys

from raybrats.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))
