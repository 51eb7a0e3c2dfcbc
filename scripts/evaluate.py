"""Measure a DreamBooth LoRA, and with --checkpoints find which of its weights to keep.

python scripts/evaluate.py RUN [--photos HELD_OUT_FOLDER] [--checkpoints] [--prompts "..." "..."]

It prints a table. RUN/evaluation.json holds the metrics, RUN/evaluation the pictures, RUN/best the
best checkpoint's LoRA. The card and the report show the metrics too. Of RUN@STEP, RUN@best, or a
run that was stopped, RUN/evaluation-step-STEP has all of it.
"""

import argparse
import sys
from pathlib import Path

from trainers.cli import find_run, make_parser, positive_int, run_main, silence_libraries

# the arguments that are fields of EvaluationOptions
OPTIONS = "photos prompts class_prompts checkpoints strengths num_images concept".split()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="A DreamBooth run folder, RUN@STEP or RUN@best.")
    help = "A folder with photos of the subject that were not trained on."
    parser.add_argument("--photos", type=Path, help=help)
    help = "Prompts to sample and to measure. By default the run's validation prompts."
    parser.add_argument("--prompts", nargs="+", help=help)
    help = "Prompts whose pictures must not change. By default the run's own."
    parser.add_argument("--class-prompt", nargs="+", dest="class_prompts", help=help)
    help = "Measure all checkpoints, and export the best to RUN/best."
    parser.add_argument("--checkpoints", action="store_true", help=help)
    help = "Of a run with several concepts: the name of the one to measure. By default the first."
    parser.add_argument("--concept", help=help)
    help = "Scales of the LoRA. By default 0 to 1.5 in steps of 0.25."
    parser.add_argument("--strengths", nargs="*", type=float, help=help)
    help = "Pictures per prompt. By default 8."
    parser.add_argument("--num-images", type=positive_int, help=help)
    help = "A DINO network: a folder, or a name on the Hub that was downloaded before."
    parser.add_argument("--dino", help=help)
    help = "A CLIP network: a folder, or a name on the Hub that was downloaded before."
    parser.add_argument("--clip", help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    found = find_run(arguments.run, "dreambooth")
    silence_libraries()

    from trainers.distributed.accelerator import best_device
    from trainers.evaluate import EvaluationOptions, card_metrics, evaluate, format_evaluation
    from trainers.metrics.feature_networks import find_networks
    from trainers.publishing.model_card import add_metrics
    from trainers.publishing.report import write_report

    networks = find_networks(arguments.dino, arguments.clip, best_device())
    values = {name: getattr(arguments, name) for name in OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    options = EvaluationOptions(**given, step=found.step, is_best=found.is_best)
    result = evaluate(found.config, found.run, networks, options)
    print(format_evaluation(result))
    # the card and the report are of the finished run
    if found.step is None:
        add_metrics(found.run, card_metrics(result))
        write_report(found.run, pictures=False)
        print(write_report(found.run))


if __name__ == "__main__":
    sys.exit(run_main(main))
