"""Train diffusion models from one YAML file: LoRA DreamBooth on diffusers and PEFT."""


class UserError(Exception):
    """What the user can mend; scripts print its message and exit with its status."""

    status = 2


class RunFailedError(UserError):
    """Memory, disk, network or another process failed: no mistake in the config, and nothing to mend in the code."""

    status = 1


class Interrupted(BaseException):
    """A signal asked the run to stop, and its checkpoint is written; scripts exit with status 128 + number."""

    def __init__(self, number: int) -> None:
        self.number = number
