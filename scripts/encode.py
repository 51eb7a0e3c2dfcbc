"""The codes that a trained autoencoder gives to pictures, and how badly it gives each of them back.

python scripts/encode.py RUN PICTURE_OR_FOLDER ... [--out codes.npz]

The file holds `name` (N,), `code` (N, D) and `score` (N,): of anomaly, or the squared error of pictures in 0..1.
"""

import argparse
import sys
from pathlib import Path

from trainers.cli import exit_status, finished, silence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder of an autoencoder")
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders with pictures")
    parser.add_argument("--out", type=Path, default=Path("codes.npz"), help="a .npz or .parquet file")
    arguments = parser.parse_args()
    config = finished(arguments.run, "autoencoder")
    silence()

    import datasets
    import numpy as np

    from trainers.autoencoder import encode
    from trainers.data import files

    known = arguments.out.suffix in (".npz", ".parquet")
    out = arguments.out if known else arguments.out.with_name(f"{arguments.out.name}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = encode(config, arguments.run, files(arguments.pictures))
    if out.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(out)
    else:
        np.savez(out, **columns)
    print(f"{out}: {len(columns['name'])} codes of {columns['code'].shape[1]} numbers")


if __name__ == "__main__":
    sys.exit(exit_status(main))
