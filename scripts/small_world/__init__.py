"""A tiny world in which what a LoRA learns can be measured in minutes: drawings, and a judge that
reads them."""
