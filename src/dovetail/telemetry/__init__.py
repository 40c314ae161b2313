"""What a run tells people and trackers: lines, bars, metrics, timings. Imports no torch."""
