"""Train a LoRA on the small world, then show and judge what it learned: a table, a picture, and an
exit status.

python scripts/quickstart.py [CONFIG] [section.key=value ...]        (CONFIG:
configs/quickstart.yaml)
"""

import sys

from trainers.cli import run_main, silence_libraries


def main() -> int:
    from trainers.config.loading import load_config

    path = sys.argv.pop(1) if sys.argv[1:] and "=" not in sys.argv[1] else "configs/quickstart.yaml"
    config = load_config(path, sys.argv[1:])
    silence_libraries()
    from small_world.judge import (
        before_after_grid,
        format_gate,
        gate,
        load_judge,
        load_pipeline,
        measure_samples,
    )
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
    print(f"\nbefore and after: {picture}\nthe LoRA: {config.output_dir / WEIGHT_NAME}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
