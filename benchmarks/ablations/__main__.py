"""`python -m benchmarks.ablations`: see sweep.py."""

from benchmarks.ablations.sweep import main

if __name__ == "__main__":
    main()
