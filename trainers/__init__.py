"""Train diffusion models from one YAML file."""
