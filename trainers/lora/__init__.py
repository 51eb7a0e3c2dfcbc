"""LoRA: where it goes, what it adds to a layer, and the files of every program that reads it."""
