"""The training step, and what keeps a run safe: checkpoints, signals, logs."""
