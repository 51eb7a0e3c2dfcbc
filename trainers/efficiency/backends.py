"""How CUDA's libraries compute while a run trains; nothing else sets `torch.backends`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


@contextmanager
def training_backends(accelerator: Accelerator) -> Iterator[None]:
    """Inside, what a run in half precision computes in float32 may use TF32; all is put back after.

    TF32 keeps 10 bits of each factor, as float16 does; bfloat16 keeps 7. A run in float32 keeps
    PyTorch's setting: TF32 for convolutions alone. cuDNN never times its kernels, whatever was set
    before: which is the fastest differs between processes, and a resumed run would round otherwise.
    """
    if accelerator.device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    if accelerator.mixed_precision != "no":
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
