"""How good a finished DreamBooth LoRA is, and with --checkpoints which of its weights to keep.

python scripts/evaluate.py RUN [--photos HELD_OUT_FOLDER] [--checkpoints] [--prompts "..." "..."]

Prints a table; RUN/evaluation.json holds the figures, RUN/evaluation the pictures, RUN/best the
best checkpoint's LoRA. The card and the report have the figures too.
"""

import sys
from pathlib import Path

from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.run_folder import load_run_config


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="the run folder of a dreambooth")
    parser.add_argument(
        "--photos", type=Path, help="photos of the subject that were not trained on"
    )
    parser.add_argument(
        "--prompts", nargs="+", help="to sample and read; a run has its validation prompts"
    )
    parser.add_argument(
        "--class-prompt",
        nargs="+",
        dest="class_prompts",
        help="what must not change; a run has its own",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="measure them all, and export the best to RUN/best",
    )
    parser.add_argument(
        "--strengths", nargs="*", type=float, help="scales of the LoRA; 0 to 1.5 in steps of 0.25"
    )
    parser.add_argument("--num-images", type=positive_int, help="pictures per prompt; 8")
    parser.add_argument(
        "--dino", help="a DINO network: a folder, or a Hub name that was fetched before"
    )
    parser.add_argument("--clip", help="a CLIP network, likewise")
    arguments = parser.parse_args()
    config = load_run_config(arguments.run, "dreambooth")
    silence_libraries()

    from trainers.distributed.accelerator import best_device
    from trainers.evaluate import EvaluationOptions, card_metrics, evaluate, format_evaluation
    from trainers.metrics.feature_networks import find_networks
    from trainers.publishing.model_card import add_metrics
    from trainers.publishing.report import write_report

    networks = find_networks(arguments.dino, arguments.clip, best_device())
    option_names = ("photos", "prompts", "class_prompts", "checkpoints", "strengths", "num_images")
    options = EvaluationOptions(
        **{name: value for name in option_names if (value := getattr(arguments, name)) is not None}
    )
    result = evaluate(config, arguments.run, networks, options)
    print(format_evaluation(result))
    add_metrics(arguments.run, card_metrics(result))
    write_report(arguments.run, pictures=False)
    print(write_report(arguments.run))


if __name__ == "__main__":
    sys.exit(run_main(main))
