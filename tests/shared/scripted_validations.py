"""Runs whose validations give what a test says, by step."""

import os

import pytest
from safetensors.torch import load_file

from trainers.dreambooth import DreamBooth
from trainers.run_folder import BEST, LORA_NAMES, WEIGHT_NAME, read_best, read_metrics

LORA_FILES = set(LORA_NAMES)  # SD1.5 has both


@pytest.fixture
def held_out(settings, other_photos):
    """A function: overrides -> Config of a run of six steps that validates after each."""

    def make(*overrides, **more):
        shared = f"data.held_out_dir={other_photos}", "validation.validation_steps=1"
        return settings(*shared, *overrides, **more)

    return make


@pytest.fixture
def script(monkeypatch):
    """A function: the held-out loss after each step; stop=n: a kill in step n, once."""
    return script_validations(monkeypatch.setattr)


def script_validations(setattr):
    losses, now, kills = DreamBooth.losses, [0], []

    def install(curve, stop=None):
        kills[:] = [stop]

        def noting(task, batch, rng):
            if rng.step + 1 in kills:
                kills.clear()
                raise KeyboardInterrupt
            now[0] = rng.step + 1
            yield from losses(task, batch, rng)

        def validate(task):
            return {"held_out_loss": float(curve[now[0] - 1])}

        setattr(DreamBooth, "losses", noting)
        setattr(DreamBooth, "validate", validate)

    return install


CURVE = [5, 3, 4, 3, 1, 0]


def disagree():
    """In a process: its validations improve with each step, but for those of the main process."""
    is_main = os.environ["RANK"] == "0"
    script_validations(setattr)(CURVE if is_main else [-step for step in range(6)])


def best_step(config):
    """The step of best/, whose LoRA must be that of its checkpoint."""
    record = read_best(config.output_dir / BEST)
    if not record:
        assert not (config.output_dir / BEST).exists()
        return None
    of_step = config.output_dir / f"checkpoints/step-{record['step']:06d}"
    if (of_step / WEIGHT_NAME).is_file():
        assert_same_tensors(config.output_dir / BEST, of_step)
    return record["step"]


def assert_same_tensors(one, other):
    """Of the LoRA files of two folders, to the bit."""
    assert {path.name for path in one.glob("*.safetensors")} == LORA_FILES
    for name in LORA_FILES:
        first, second = (load_file(folder / name) for folder in (one, other))
        assert first.keys() == second.keys()
        assert all(tensor.equal(second[key]) for key, tensor in first.items())


def last_step(config):
    return read_metrics(config.output_dir)[-1]["step"]


def assert_same_end(one, other):
    """The same last step, best step and weights of both, to the bit."""
    assert last_step(one) == last_step(other)
    assert read_best(one.output_dir / BEST) == read_best(other.output_dir / BEST)
    assert_same_tensors(one.output_dir / BEST, other.output_dir / BEST)
    assert_same_tensors(one.output_dir, other.output_dir)
