"""What to measure on the day a GPU is there: steps in order of value, each alone, resumable, rehearsed on a CPU."""
