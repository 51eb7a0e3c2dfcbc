"""The accelerator, what processes owe each other, and a base or an optimizer that is cut among
them."""
