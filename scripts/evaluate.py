"""How good a finished DreamBooth LoRA is, and with --checkpoints which of its weights to keep.

python scripts/evaluate.py RUN [--photos HELD_OUT_FOLDER] [--checkpoints] [--prompts "..." "..."]

Prints a table; RUN/evaluation.json holds the figures, RUN/evaluation the pictures, RUN/best the best checkpoint's LoRA.
The card and the report have the figures too.
"""

import sys
from pathlib import Path

from trainers.cli import exit_status, parser_of, positive, silence
from trainers.distributed.accelerator import best_device
from trainers.run_folder import finished


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="the run folder of a dreambooth")
    parser.add_argument("--photos", type=Path, help="photos of the subject that were not trained on")
    parser.add_argument("--prompts", nargs="+", help="to sample and read; a run has its validation prompts")
    parser.add_argument(
        "--class-prompt", nargs="+", dest="class_prompts", help="what must not change; a run has its own"
    )
    parser.add_argument("--checkpoints", action="store_true", help="measure them all, and export the best to RUN/best")
    parser.add_argument("--strengths", nargs="*", type=float, help="scales of the LoRA; 0 to 1.5 in steps of 0.25")
    parser.add_argument("--num-images", type=positive, help="pictures per prompt; 8")
    parser.add_argument("--dino", help="a DINO network: a folder, or a Hub name that was fetched before")
    parser.add_argument("--clip", help="a CLIP network, likewise")
    arguments = parser.parse_args()
    config = finished(arguments.run, "dreambooth")
    silence()

    from trainers.evaluate import Wishes, evaluate, headline, table
    from trainers.metrics.feature_networks import nets_at_hand
    from trainers.publishing.model_card import add_figures
    from trainers.publishing.report import write_report

    nets = nets_at_hand(arguments.dino, arguments.clip, best_device())
    wished = ("photos", "prompts", "class_prompts", "checkpoints", "strengths", "num_images")
    wishes = Wishes(**{name: value for name in wished if (value := getattr(arguments, name)) is not None})
    result = evaluate(config, arguments.run, nets, wishes)
    print(table(result))
    add_figures(arguments.run, headline(result))
    write_report(arguments.run, pictures=False)
    print(write_report(arguments.run))


if __name__ == "__main__":
    sys.exit(exit_status(main))
