r"""raybrats tune as a job.

ray job submit --working-dir . -- python jobs/tune.py crop128 \
        --data.cohort s3://bucket/cohort.parquet \
        --space "loss.dice_weight=uniform(0.2,0.8)" \
        --trials 8
"""

import sys

from raybrats.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
