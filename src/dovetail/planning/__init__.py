"""Memory, time and cost of a run, from the shapes of its models alone; without torch."""
