"""What Ray drives: attempts of runs, their workers, sweeps."""
