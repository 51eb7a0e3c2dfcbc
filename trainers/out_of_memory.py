"""Errors that tell that memory is used up, whoever raises them."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size

OUT_OF_MEMORY_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's memory or an accelerator's is used up, also as told by CUDA itself and by
    its libraries."""
    return should_reduce_batch_size(error) or any(
        words in str(error) for words in OUT_OF_MEMORY_MESSAGES
    )
