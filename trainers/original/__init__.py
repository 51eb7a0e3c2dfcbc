"""A model in the layout of its first release: one file, with other names than diffusers has."""
