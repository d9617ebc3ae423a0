r"""raybrats train as a job.

ray job submit --working-dir . -- python jobs/train.py nnunet \
        --data.cohort s3://bucket/cohort.parquet \
        --cluster.workers 4 \
        --optim.global_batch 8
"""

import sys

from raybrats.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
