"""What `scripts/benchmark` measures on, and what it measures with."""
