"""The disk half of training: checkpoints, the run folder, its identity and its lock."""
