"""The trial of credit rules; `python -m benchmarks.ablations` runs what is missing of it."""
