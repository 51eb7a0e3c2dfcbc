"""What goes wrong around a run: explained in a message, or survived."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError

from trainers.config import Config
from trainers.errors import RunFailedError

FULL = (errno.ENOSPC, errno.EDQUOT)


REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


GONE = ("closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "gloo")  # in lower case


@contextmanager
def explained(config: Config, processes: int) -> Iterator[None]:
    """Failures that lie outside of the code become a `RunFailedError` that tells what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        if out_of_memory(error):
            wishes = "\n".join(f"  {wish}" for wish in config.lighter())
            raise RunFailedError(
                f"out of memory ({said[:200]}). The cheapest remedies first:\n{wishes}\n{kept(config)}"
            ) from error
        if full(error):
            raise RunFailedError(f"the disk is full ({said}). Free some space. {kept(config)}") from error
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise RunFailedError(f"{said}. {kept(config)}") from error
        if processes > 1 and any(word in said.lower() for word in GONE):
            raise RunFailedError(f"another process ended or hangs ({said[:200]}). {kept(config)}") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether the host's memory or an accelerator's is used up, also as told by CUDA itself and by its libraries."""
    return should_reduce_batch_size(error) or any(words in str(error) for words in OUT_OF_MEMORY)


def full(error: Exception) -> bool:
    """Whether the disk is, also as told by safetensors, which has its own error."""
    return getattr(error, "errno", None) in FULL or "No space left" in str(error) or "StorageFull" in str(error)


def kept(config: Config) -> str:
    """What remains, and how to go on."""
    from trainers.run_folder import checkpoints

    found = checkpoints(config.output_dir / "checkpoints")
    if not found:
        return "There is no checkpoint yet: the same command begins anew"
    return f"The checkpoint {found[0].name} is intact: the same command goes on from it"
