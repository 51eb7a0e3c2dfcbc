"""Losses, noise, times and arguments of optimizers in other trainers' configs become ours."""

import pytest
import yaml

from trainers.config.importers import import_config

OBJECTIVES = {
    "a.toml": (
        'network_module = "networks.lora"\nnetwork_dim = 4\nunet_lr = 1e-4\nloss_type = "huber"\n'
        'huber_schedule = "exponential"\nhuber_c = 0.2\nip_noise_gamma = 0.1\n'
        "multires_noise_iterations = 6\nmultires_noise_discount = 0.4\nmax_timestep = 900",
        {
            "loss": "huber",
            "huber_schedule": "exponential",
            "huber_c": 0.2,
            "input_perturbation": 0.1,
            "multires_noise_levels": 6,
            "multires_noise_discount": 0.4,
            "t_range": [0, 0.9],
        },
    ),
    "b.toml": (
        'network_module = "networks.lora"\nnetwork_dim = 4\nunet_lr = 1e-4\nloss_type = "l2"\n'
        "huber_c = 0.2\nmin_timestep = 0\nmultires_noise_discount = 0.4",
        {"loss": None, "huber_c": None, "t_range": None, "multires_noise_discount": None},
    ),
    "a.yaml": (
        "job: x\nconfig: {process: [{model: {arch: flux}, datasets: [{folder_path: x}], "
        "train: {min_denoising_steps: 200, max_denoising_steps: 1000}}]}",
        {"t_range": [0.2, 1]},
    ),
    "a.json": (
        '{"training_method": "LORA", "min_noising_strength": 0.25, "max_noising_strength": 0.75}',
        {"t_range": [0.25, 0.75]},
    ),
    "b.json": (
        '{"model_family": "sd3", "model_type": "lora", "loss_type": "smooth_l1", '
        '"input_perturbation": 0.05}',
        {"loss": "smooth_l1", "input_perturbation": 0.05},
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_noise_and_times_are_ours(tmp_path, name):
    text, expected = OBJECTIVES[name]
    (tmp_path / name).write_text(text)
    imported = import_config(tmp_path / name)
    assert {key: imported.value(f"objective.{key}") for key in expected} == expected
    assert not {"loss_type", "huber_c", "min_timestep"} & imported.leftovers().keys()


def test_arguments_of_an_optimizer_are_our_keys_or_its_own(tmp_path):
    (tmp_path / "a.toml").write_text(
        'network_module = "networks.lora"\nnetwork_dim = 4\nunet_lr = 1.0\n'
        'optimizer_type = "Prodigy"\n'
        'optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99", "decouple=True", "d_coef=2"]'
    )
    imported = import_config(tmp_path / "a.toml")
    assert imported.value("optimizer.name") == "prodigy"
    assert imported.value("optimizer.betas") == [0.9, 0.99]
    assert imported.value("optimizer.weight_decay") == 0.01
    assert imported.value("optimizer.arguments") == {"decouple": True, "d_coef": 2}
    assert "optimizer_args" not in imported.leftovers()
    assert yaml.safe_load(imported.to_yaml()) == imported.tree()


def test_a_loss_that_is_not_ours_is_left_over(tmp_path):
    text = 'network_module = "networks.lora"\nnetwork_dim = 4\nunet_lr = 1e-4\nloss_type = "l1"'
    (tmp_path / "a.toml").write_text(text)
    imported = import_config(tmp_path / "a.toml")
    assert imported.leftovers()["loss_type"] == "l1"
    assert imported.value("objective.loss") is None
