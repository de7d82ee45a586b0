"""Benchmarks of visual retrieval; `python -m benchmarks.retrieval` times searches, ingest and encoders."""
