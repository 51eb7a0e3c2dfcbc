"""A finished run is trained longer where that is meant, with the schedule of the new length."""

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.shared.runs import losses, read_metrics
from trainers import dreambooth
from trainers.config import DreamBoothConfig
from trainers.config.base_sections import CheckpointConfig, OptimizerConfig
from trainers.errors import UserError
from trainers.run import run
from trainers.training.checkpoint import read_checkpoint
from trainers.training.facts import check_facts, find_extension, resume_facts
from trainers.training.loop import StopReason
from trainers.training.optimizers import make_lr_schedule

COSINE = "optimizer.lr_scheduler=cosine"
EXTEND = "checkpoint.extend=true"


@pytest.fixture
def train(settings):
    """A function: overrides -> Config of a run that was trained."""

    def call(*overrides):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = settings(*overrides)
        run(config)
        return config

    return call


def rates(config):
    return [row["learning_rate"] for row in read_metrics(config)]


def manifest_of(config, step):
    return read_checkpoint(config.output_dir / f"checkpoints/step-{step:06d}")[0]


def test_the_schedule_is_that_of_the_new_length_from_there_on(train, tmp_path, capsys):
    train(COSINE, "train.max_train_steps=2")
    with pytest.raises(UserError) as refusal:
        train(COSINE, "train.max_train_steps=4")
    message = str(refusal.value)
    assert "train.max_train_steps: was 2, is 4" in message
    assert "checkpoint.extend=true goes on from there" in message
    assert "another output_dir trains from step 0" in message
    extended = train(COSINE, "train.max_train_steps=4", EXTEND)
    assert "trained longer from step 2 on" in capsys.readouterr().out
    short, long = (make_lr_schedule(extended.optimizer, steps) for steps in (2, 4))
    peak = extended.optimizer.learning_rate
    assert rates(extended) == [peak * s(i) for i, s in enumerate((short, short, long, long))]
    entry = {"from_step": 2, "max_train_steps": 4, "before": 2, "end": ""}
    assert manifest_of(extended, 4)["extensions"] == [entry]
    assert "4 of 2 x 1 pictures" in (extended.output_dir / "README.md").read_text()
    # it is a run of that length now: the same command, and one without the key, change nothing
    for overrides in ((EXTEND,), ()):
        train(COSINE, "train.max_train_steps=4", *overrides)
        assert manifest_of(extended, 4)["extensions"] == [entry]
    undisturbed = train(COSINE, "train.max_train_steps=2", f"output_dir={tmp_path}/undisturbed")
    assert losses(extended)[:2] == losses(undisturbed)


def compare(before, now, scheduler="linear", warmup=(0, 0), extend=False):
    """The lines of the refusal to go on with `now` steps after `before`, if any."""

    def config(steps, warmup):
        return DreamBoothConfig(
            optimizer=OptimizerConfig(lr_scheduler=scheduler, lr_warmup_steps=warmup),
            train=DreamBoothConfig().train.model_copy(update={"max_train_steps": steps}),
            checkpoint=CheckpointConfig(extend=extend),
        )

    configs = [config(*pair) for pair in zip((before, now), warmup, strict=True)]
    saved, current = (resume_facts(one, Accelerator(cpu=True), {}) for one in configs)
    try:
        check_facts(configs[0].output_dir, saved, current, configs[1])
    except UserError as error:
        return str(error).splitlines()[1:]
    return []


def test_growing_is_a_choice_and_nothing_else_is():
    assert compare(400, 800, extend=True) == []
    assert "checkpoint.extend=true goes on" in compare(400, 800)[2]
    # a run is not made shorter, and other keys may not change with it
    for extend in (False, True):
        lines = compare(800, 400, extend=extend)
        assert lines[0] == "  train.max_train_steps: was 800, is 400"
        assert "goes on from there" not in "".join(lines)
    lines = compare(400, 400, warmup=(0, 10))
    assert lines[0] == "  optimizer.lr_warmup_steps: was 0, is 10"


def test_a_warm_up_that_was_reduced_for_a_short_run_may_grow_with_it():
    assert len(compare(20, 800, warmup=(2, 100))) == 6
    assert compare(20, 800, warmup=(2, 100), extend=True) == []
    constant = {"scheduler": "constant_with_warmup", "warmup": (2, 100)}
    assert compare(20, 800, **constant)[0] == "  optimizer.lr_warmup_steps: was 2, is 100"
    assert compare(20, 800, **constant, extend=True) == []
    assert compare(20, 800, scheduler="constant") == []


def test_a_run_that_is_over_is_opened_once_for_each_length():
    def find(steps, extend=True, **manifest):
        config = DreamBoothConfig(
            train=DreamBoothConfig().train.model_copy(update={"max_train_steps": steps}),
            checkpoint=CheckpointConfig(extend=extend),
        )
        return find_extension({"step": 300, "facts": {"config": {}}, **manifest}, config)

    over = {"end": "the held-out loss rises"}
    entry = {"from_step": 300, "max_train_steps": 800, "before": None, **over}
    assert find(800, **over) == entry
    assert find(800, extend=False, **over) is None
    assert find(300, **over) is None
    assert find(800) is None
    assert find(800, **over, extensions=[entry]) is None
    assert find(900, **over, extensions=[entry])["max_train_steps"] == 900


def test_a_run_that_a_callback_ended_trains_on_if_that_is_meant(train, monkeypatch, capsys):
    original = dreambooth.DreamBooth.__init__

    def init(task, *arguments):
        original(task, *arguments)
        stop = StopReason("the held-out loss rises", 1)
        task.callbacks = [*task.callbacks, lambda step, metrics: stop if step == 1 else None]

    monkeypatch.setattr(dreambooth.DreamBooth, "__init__", init)
    config = train("train.max_train_steps=3")
    train("train.max_train_steps=3")
    assert len(losses(config)) == 1
    assert (
        "over after step 1: the held-out loss rises. checkpoint.extend" in capsys.readouterr().out
    )
    train("train.max_train_steps=3", EXTEND)
    assert len(losses(config)) == 3
    manifest = manifest_of(config, 3)
    assert (manifest["end"], len(manifest["extensions"])) == ("", 1)
