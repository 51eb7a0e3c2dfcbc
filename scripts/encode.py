"""Write the codes that a trained autoencoder gives to pictures, and how badly it rebuilds each, or
which are strange.

python scripts/encode.py RUN PICTURE_OR_FOLDER ... [--out codes.npz]

The file holds `name` (N,), `code` (N, D) and `score` (N,): the squared error of pictures in 0..1.

Of a run for anomalies, `score` tells how strange each picture is, and `is_strange` whether that is
above the threshold of the run. Heat maps go into a folder beside the file, CODES_maps: a .png of
the size of each picture, which shows where it is strange, and a .tiff with the same as numbers.
"""

import sys

from trainers.cli import parse_picture_arguments, run_main


def main() -> None:
    help = "The file to write, .npz or .parquet."
    arguments, config = parse_picture_arguments(__doc__, "autoencoder", "codes.npz", help)

    import datasets
    import numpy as np

    from trainers.from_scratch.encoding import encode_pictures

    known = arguments.out.suffix in (".npz", ".parquet")
    out = arguments.out if known else arguments.out.with_name(f"{arguments.out.name}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    maps = out.with_name(f"{out.stem}_maps")
    columns, judge = encode_pictures(config, arguments.run, arguments.pictures, maps)
    if out.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(out)
    else:
        np.savez(out, **columns)
    count = len(columns["name"])
    print(f"{out}: {count} codes of {columns['code'].shape[1]} numbers")
    if judge is not None:
        print(f"{maps}: heat maps")
    if "is_strange" in columns:
        rows = sorted(range(count), key=lambda row: -columns["score"][row])
        strange = [row for row in rows if columns["is_strange"][row]]
        threshold = f"{judge.threshold:.4g}, {judge.threshold_note}"
        print(f"{len(strange)} of {count} pictures are strange: their score is above {threshold}")
        for row in strange:
            print(f"  {columns['score'][row]:.4g}  {columns['name'][row]}")
    elif judge is not None:
        print(f"no verdict: the threshold is {judge.threshold_note}")


if __name__ == "__main__":
    sys.exit(run_main(main))
