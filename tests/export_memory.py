"""Peak memory and time of writing a LoRA of Flux.1's true size and comparing it with its file.

python tests/export_memory.py [kohya | diffusers | peft] [--rank 16]

The base has configs alone, and the factors of every linear layer are random.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tests.shared.true_sizes import true_size_base
from trainers.lora.base_layers import adaptable_shapes
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, load_format
from trainers.lora.update import LoraUpdate, max_relative_difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", nargs="?", choices=FORMATS, default="kohya")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        family = true_size_base(Path(folder) / "base", "flux")
        lora_format = load_format(arguments.format)
        start, rng, lora = time.monotonic(), torch.Generator().manual_seed(0), {}
        for name, (outputs, inputs) in adaptable_shapes(family).items():
            a = torch.randn(arguments.rank, inputs, generator=rng)
            lora[name] = LoraUpdate(a, torch.randn(outputs, arguments.rank, generator=rng))
        out = Path(folder) / f"out{lora_format.SUFFIX}"
        lora_format.write(lora, family, out, {})
        back = read_lora(out, family)
        difference = max_relative_difference(lora, back)
        seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.format}: {len(lora)} layers of rank {arguments.rank}, difference "
        f"{difference:.1e}, peak {peak:.2f} GiB, {seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
