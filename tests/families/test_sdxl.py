"""What SDXL alone has: sizes as a condition, an unread layer, zeros for no prompt, the refiner."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image

from reference.step import call_denoiser, corrupt, encode
from tests.shared.families import TEXT, conditioned, whole
from tests.shared.runs import PRIOR, first_gradients
from tests.shared.tiny_pipelines import make_sdxl
from trainers.config import PromptsConfig
from trainers.data.crops import GEOMETRY
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.families.sampling import sample_picture

# original size, crop corner, size of the result: as the pipeline's arguments call them
GEOMETRIES = [(300, 200, 0, 7, 16, 24), (16, 24, 0, 0, 16, 24), (4096, 3333, 11, 0, 16, 24)]


def draw(pipe, **more):
    """One step of the pipeline's own call without guidance: the latents before and after it."""
    seen = {}

    def note(_, args, kwargs, output):
        seen["x_t"], seen["t"] = args[0], args[1]

    hook = pipe.unet.register_forward_hook(note, with_kwargs=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    noise = torch.Generator().manual_seed(0)
    after = pipe("a b c", height=16, width=24, generator=noise, **settings, **more).images
    hook.remove()
    return seen["x_t"], seen["t"], after


@pytest.mark.parametrize("sizes", [None, *GEOMETRIES])
@torch.no_grad()
def test_one_step_of_the_pipelines_own_call_is_ours(settings, pipes, sizes):
    """None: as it draws; else a row of a batch with the same sizes."""
    family, pipe, named = whole(settings(family="sdxl")), pipes["sdxl"], {}
    condition = conditioned(family, "a b c")
    if sizes:
        names = ("original_size", "crops_coords_top_left", "target_size")
        named = {name: sizes[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        condition["time_ids"] = torch.tensor([sizes])
    x_t, t, after = draw(pipe, **named)
    ours = family.predict(family.denoiser, x_t, t, condition)
    # the scheduler scales what the U-Net reads: its step begins at the noise itself
    pipe.scheduler.set_timesteps(1)
    sigma = pipe.scheduler.sigmas[0]
    start = x_t * (sigma**2 + 1).sqrt()
    torch.testing.assert_close(start - sigma * ours, after, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_each_row_is_read_with_its_own_sizes(settings):
    family = whole(settings(family="sdxl"))
    text = {key: value[None] for key, value in family.encode_prompt("text_encoder", "a").items()}
    text |= {key: v[None] for key, v in family.encode_prompt("text_encoder_2", "a").items()}
    x_t, t = torch.randn(1, 4, 8, 12), torch.tensor([400])
    rows = {key: value.expand(3, *value.shape[1:]) for key, value in text.items()}
    rows[GEOMETRY] = torch.tensor(GEOMETRIES)
    together = family.denoise(family.denoiser, x_t.expand(3, -1, -1, -1), t.expand(3), rows)
    for row, sizes in zip(together, GEOMETRIES, strict=True):
        alone = text | {GEOMETRY: torch.tensor([sizes])}
        torch.testing.assert_close(family.denoise(family.denoiser, x_t, t, alone)[0], row)
    # the second is what the pipeline draws with, the others are not
    plain = family.denoise(family.denoiser, x_t, t, text)[0]
    torch.testing.assert_close(together[1], plain)
    assert (together[0] - plain).abs().max() > 1e-4


def test_sizes_stay_whole_numbers_in_half_precision(settings):
    """In bfloat16 3333 pixels would be 3328."""
    config, seen = settings(family="sdxl"), []
    family = FAMILIES["sdxl"](config.model, dtype=torch.bfloat16)
    text = {"text_encoder": torch.ones(1, 12, 16), "text_encoder_2": torch.ones(1, 12, 8)}
    text |= {"text_encoder_2_pooled": torch.ones(1, 8), GEOMETRY: torch.tensor([GEOMETRIES[2]])}

    def denoiser(x_t, t, words, added_cond_kwargs, return_dict):
        seen.append((words, added_cond_kwargs))
        return (x_t,)

    family.denoise(denoiser, torch.ones(1, 4, 8, 12), torch.tensor([1]), text)
    ((words, added),) = seen
    assert added["time_ids"].tolist() == [list(GEOMETRIES[2])]
    assert {words.dtype, added["text_embeds"].dtype} == {torch.bfloat16}


@pytest.fixture
def photos_of_unlike_sizes(tmp_path):
    folder = tmp_path / "unlike"
    folder.mkdir()
    for i, size in enumerate([(48, 40), (23, 20), (100, 90)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{i}.png")
    return folder


SCHEDULERS = {
    "eps": {},
    "v": {"prediction_type": "v_prediction"},
    "v, zero terminal SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
STEPS = [(), (TEXT,), (TEXT, *PRIOR)]


@pytest.mark.parametrize("overrides", STEPS, ids=["unet", "text encoders", "and prior"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_loss_and_every_gradient_equal_an_independent_step(
    settings, tmp_path, photos_of_unlike_sizes, scheduler, overrides
):
    """The reference shares the draws, and the sizes that the photos' files have."""
    make_sdxl(**scheduler).save_pretrained(tmp_path / "base")
    config = settings(
        f"model.pretrained_model_name_or_path={tmp_path / 'base'}",
        f"data.instance_data_dir={photos_of_unlike_sizes}",
        "data.buckets=false",
        *overrides,
        family="sdxl",
    )
    task, batch, rows, loss, gradients = first_gradients(config)
    trained = {"unet": task.family.denoiser, **task.module.text_encoders}
    assert len(trained) == (3 if TEXT in overrides else 1)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", **trained)
    rng = SampleRng(0, 0, rows, global_batch_size=2)
    mean, logvar = batch["moments"].chunk(2, dim=1)
    x0 = (mean + (0.5 * logvar).exp() * rng.normal(mean.shape)) * pipe.vae.config.scaling_factor
    eps = rng.normal(x0.shape)
    t = (rng.uniform(stratified=True) * 1000).long()
    x_t, target = corrupt("sdxl", dict(pipe.scheduler.config), x0, eps, t)
    prompts = ["a b c"] * 2 + ["c"] * (len(rows) - 2)
    encoded = [encode(pipe, "sdxl", prompt, None) for prompt in prompts]
    words, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    task.module.zero_grad()
    text = [words, pooled, batch["geometry"]]
    error = (call_denoiser("sdxl", pipe.unet, x_t, t, text) - target).square().mean((1, 2, 3))
    expected = error[:2].mean() + (0.5 * error[2:].mean() if len(rows) > 2 else 0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, parameter in trainable_parameters(task.module).items():
        assert gradients[key].abs().max() > 0, key
        torch.testing.assert_close(gradients[key], parameter.grad, msg=key)
    sizes = {(40, 48), (20, 23), (90, 100)}
    assert {tuple(row[:2].tolist()) for row in batch["geometry"][:2]} <= sizes
    assert {tuple(row[4:].tolist()) for row in batch["geometry"]} == {(16, 16)}


@pytest.mark.parametrize("lora", [(), ("lora=null",)], ids=["LoRA", "all weights"])
def test_no_layer_trains_whose_output_is_not_read(settings, lora):
    """DistributedDataParallel would wait for its gradient."""
    *_, gradients = first_gradients(settings(TEXT, *lora, family="sdxl"))
    first = {key for key in gradients if key.startswith("text_encoders.text_encoder.")}
    assert first
    assert not any("layers.1." in key or "final_layer_norm" in key for key in first)
    without = [key for key, gradient in gradients.items() if gradient is None]
    assert without == []
    second = {key for key in gradients if key.startswith("text_encoders.text_encoder_2.")}
    assert any("layers.1." in key for key in second)


VALIDATION = PromptsConfig(prompts=["a b"], num_inference_steps=2, guidance_scale=3.0)


def plain_picture(pipe, **more):
    noise = torch.Generator().manual_seed(7)
    size = {"height": 16, "width": 24, "num_inference_steps": 2, "guidance_scale": 3.0}
    return pipe("a b", generator=noise, **size, **more).images[0].tobytes()


@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_none(settings, bases, tmp_path, zeros):
    pipe = StableDiffusionXLPipeline.from_pretrained(
        bases["sdxl"], force_zeros_for_empty_prompt=zeros
    )
    pipe.save_pretrained(tmp_path / "base")
    base = f"model.pretrained_model_name_or_path={tmp_path / 'base'}"
    family = whole(settings(base, family="sdxl"))
    ours = sample_picture(family, "a b", VALIDATION, 7, (24, 16)).tobytes()
    assert ours == plain_picture(pipe)
    assert (ours == plain_picture(pipe, negative_prompt="")) != zeros
    negative = VALIDATION.model_copy(update={"negative_prompt": "c"})
    ours = sample_picture(family, "a b", negative, 7, (24, 16)).tobytes()
    assert ours == plain_picture(pipe, negative_prompt="c")


def test_an_autoencoder_that_overflows_in_float16_draws_the_same_picture(settings, tmp_path):
    """What a layer gives is more than float16 can hold, and the next norm makes it small again."""
    pipe = make_sdxl()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 3e4
        pipe.vae.decoder.conv_in.bias *= 3e4
    pipe.save_pretrained(tmp_path / "base")
    base = f"model.pretrained_model_name_or_path={tmp_path / 'base'}"
    model = settings(base, family="sdxl").model
    pictures = []
    for dtype in (torch.float32, torch.float16):
        family = FAMILIES["sdxl"](model, dtype=dtype)
        family.load("unet", "vae", *family.text_encoder_names)
        picture = sample_picture(family, "a b", VALIDATION, 7, (24, 16))
        pictures.append(torch.tensor(list(picture.tobytes())).float())
    assert pictures[1].std() > 5
    assert F.l1_loss(*pictures) < 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "is the refiner of SDXL.*Train on the base"),
        ("StableDiffusionXLInpaintPipeline", "filling holes.*plain base"),
    ],
)
def test_the_refiner_and_the_like_are_refused_by_what_they_are(
    settings, bases, tmp_path, kind, message
):
    folder = shutil.copytree(bases["sdxl"], tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(UserError, match=message):
        whole(settings(f"model.pretrained_model_name_or_path={folder}", family="sdxl"))


def test_a_base_with_other_noise_levels_is_refused(settings, bases, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(bases["sdxl"])
    pipe.scheduler = EDMEulerScheduler()
    pipe.save_pretrained(tmp_path / "edm")
    config = settings(f"model.pretrained_model_name_or_path={tmp_path / 'edm'}", family="sdxl")
    with pytest.raises(UserError, match="EDMEulerScheduler, which has no betas"):
        whole(config).make_objective(config.objective, (8, 8))
