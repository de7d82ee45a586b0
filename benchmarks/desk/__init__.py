"""The demo of the desk under four ways of being shown its pages: `python -m benchmarks.desk`."""
