"""The loop, its optimizers and its callbacks, checkpoints, and what happens when a step or a run
fails."""
