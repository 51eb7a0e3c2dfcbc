"""What is not trained has the precision that its device computes in."""

import torch

from trainers.distributed.accelerator import preferred_dtype


def test_only_accelerators_without_bfloat16_compute_in_float16(monkeypatch):
    assert preferred_dtype(torch.device("cpu")) == torch.float32
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # a Turing card can only emulate it
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, found=has_bfloat16: found or including_emulation,
        )
        assert preferred_dtype(torch.device("cuda")) == expected
