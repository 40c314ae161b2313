"""The one gradient step, its optimiser, and what survives a kill: checkpoints and the run folder."""
