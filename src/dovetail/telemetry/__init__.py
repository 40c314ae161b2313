"""Report a run to people and trackers: lines, bars, metrics, timings. Imports no torch."""
