"""What every training run needs and no method: run directory, checkpoints, schedules, meters ..."""
