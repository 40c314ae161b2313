"""The one gradient step, its optimiser, and what they need of memory."""
