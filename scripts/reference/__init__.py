"""Models and training steps by diffusers' own parts: what the toolkit is measured beside."""
