"""Several processes end early after the same step as one does, by what the main one measures."""

from tests.shared.processes import launch
from tests.shared.runs import assert_close
from tests.shared.scripted_validations import CURVE, best_step, disagree, last_step
from trainers.config import loading
from trainers.run import run


def test_processes_that_measure_otherwise_end_after_the_same_step(held_out, script, tmp_path):
    stop = "train.early_stop.patience=2"
    one = held_out(stop, "train.train_batch_size=2", f"output_dir={tmp_path}/one")
    script(CURVE)
    run(one)
    two = held_out(stop, "train.train_batch_size=1", f"output_dir={tmp_path}/two")
    (tmp_path / "two.yaml").write_text(loading.dump_config(two))
    arguments = {"log": tmp_path / "log", "processes": 2, "before": disagree}
    assert launch("train.py", tmp_path / "two.yaml", **arguments) == [0, 0]
    assert last_step(two) == last_step(one) == 4
    assert best_step(two) == best_step(one) == 2
    assert_close(one, two)
