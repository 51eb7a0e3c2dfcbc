"""Train a LoRA on the small world, then show and judge what it learned.

python scripts/quickstart.py [CONFIG] [section.key=value ...]

It prints a table, writes a picture, and exits with status 1 when the LoRA has not learned enough.
"""

import sys

from trainers.cli import (
    add_config_arguments,
    make_parser,
    parse_config_arguments,
    run_main,
    silence_libraries,
)

CONFIG = "configs/quickstart.yaml"


def main() -> int:
    parser = make_parser(__doc__)
    add_config_arguments(parser, CONFIG)
    arguments = parse_config_arguments(parser)
    path, overrides = arguments.config, arguments.overrides
    if "=" in path:
        path, overrides = CONFIG, [path, *overrides]
    from trainers.config.loading import load_config

    config = load_config(path, overrides)
    silence_libraries()
    from small_world.gate import before_after_grid, format_gate, gate
    from small_world.judge import load_judge
    from small_world.measure import load_pipeline, measure_samples
    from trainers.run import run
    from trainers.run_folder import WEIGHT_NAME

    run(config)
    print("measuring: the judge reads about two hundred samples", flush=True)
    judge = load_judge()
    base = measure_samples(load_pipeline(config, lora=False), judge, config)
    tuned = measure_samples(load_pipeline(config, lora=True), judge, config, base)
    passed = gate(tuned.metrics, prior=config.data.uses_prior)
    print(format_gate(base.metrics, tuned.metrics, passed))
    picture = config.output_dir / "before_after.png"
    before_after_grid(base, tuned).save(picture)
    print(f"\nbefore and after: {picture}")
    print(f"the LoRA: {config.output_dir / WEIGHT_NAME}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
