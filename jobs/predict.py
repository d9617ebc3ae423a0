r"""raybrats predict as a job.

ray job submit --working-dir . -- python jobs/predict.py models:/raybrats@champion \
        s3://bucket/cohort.parquet \
        --out s3://bucket/predictions
"""

import sys

from raybrats.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
