"""What `scripts/benchmark.py` measures on, and what it measures with."""
