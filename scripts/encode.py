"""Write the codes that a trained autoencoder gives to pictures, and how badly it rebuilds each.

python scripts/encode.py RUN PICTURE_OR_FOLDER ... [--out codes.npz]

The file holds `name` (N,), `code` (N, D) and `score` (N,): the anomaly score, or the squared error
of pictures in 0..1.
"""

import sys

from trainers.cli import parse_picture_arguments, run_main


def main() -> None:
    help = "The file to write, .npz or .parquet."
    arguments, config = parse_picture_arguments(__doc__, "autoencoder", "codes.npz", help)

    import datasets
    import numpy as np

    from trainers.autoencoder import encode_pictures

    known = arguments.out.suffix in (".npz", ".parquet")
    out = arguments.out if known else arguments.out.with_name(f"{arguments.out.name}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = encode_pictures(config, arguments.run, arguments.pictures)
    if out.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(out)
    else:
        np.savez(out, **columns)
    print(f"{out}: {len(columns['name'])} codes of {columns['code'].shape[1]} numbers")


if __name__ == "__main__":
    sys.exit(run_main(main))
