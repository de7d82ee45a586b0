"""`python -m benchmarks.retrieval`: see scale.py."""

from benchmarks.retrieval.scale import main

if __name__ == "__main__":
    main()
