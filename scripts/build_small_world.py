"""Make the small world from nothing: pictures, judge, autoencoder, tokenizer, the SD1.5 base, and the shipped assets.

python scripts/build_small_world.py            (everything, about an hour and a half on two cores)
python scripts/build_small_world.py judge vae  (some stages)
"""

import argparse
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainers import small_world
from trainers.config import OptimizerConfig, TrainConfig, load
from trainers.draws import Draws, mix
from trainers.judge import Judge
from trainers.loop import Player, train
from trainers.optim import EMA, make_optimizer, make_rate
from trainers.run import run
from trainers.small_world import caption, draw, is_subject, plain_thing, rich_thing, subject_images

LATENT_SPREAD = 4.0  # the latents' wanted standard deviation, so that scaling_factor matters
TOKENS = 16


class Fitting:
    """A task for the loop: one module, one loss of random batches of uint8 pictures with labels."""

    def __init__(self, module, pictures, labels, loss, config: OptimizerConfig, steps: int, batch: int) -> None:
        self.pictures, self.labels, self.loss, self.batch = pictures, labels, loss, batch
        optimizer = make_optimizer(config, [{"params": list(module.parameters()), "lr": config.learning_rate}])
        self.players = {"model": Player(module, optimizer, EMA(module, 0.99))}
        rate, settings = make_rate(config, steps), TrainConfig(max_train_steps=steps)
        train(self, self.batches, settings, 0, Accelerator(cpu=True), rate, [self.report])
        self.players["model"].ema.swap()
        module.eval()

    def batches(self, step):
        r = torch.Generator().manual_seed(mix("fitting", step))
        index = torch.randint(len(self.pictures), (self.batch,), generator=r)
        yield (pixels(self.pictures[index]), self.labels[index]), Draws(0, step, range(self.batch))

    def losses(self, batch, rng):
        yield "model", self.loss(*batch)

    def report(self, step, means):
        if step % 200 == 0:
            print(f"step {step}  loss {means['model_loss'].item():.4f}", flush=True)


def pixels(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawings(count, seed, thing, jitter):
    """Arrays of pictures (N, H, W, 3) and labels (N, 6)."""
    rng, pictures, labels = np.random.default_rng(seed), [], []
    while len(pictures) < count:
        drawn = thing(rng)
        pictures.append(np.asarray(draw(drawn, rng, jitter)))
        labels.append(drawn.labels())
    return torch.from_numpy(np.stack(pictures)), torch.tensor(labels)


def without_subject(rng):
    while is_subject(thing := rich_thing(rng)):
        pass
    return thing


def make_judge(folder: Path) -> None:
    pictures, labels = drawings(16000, 3, rich_thing, 0.6)
    judge = Judge()

    def loss(x, y):
        if torch.rand(()) < 0.5:
            x = x + torch.randn_like(x) * 0.15 * torch.rand(len(x), 1, 1, 1)
        if torch.rand(()) < 0.4:  # tolerate a soft decoder
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return sum(F.cross_entropy(logits, y[:, i]) for i, logits in enumerate(judge(x)[0].values()))

    Fitting(judge, pictures, labels, loss, OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine"), 1600, 64)
    unseen, truth = drawings(1500, 4, rich_thing, 0.6)
    with torch.no_grad():
        judge.centre.copy_(judge(pixels(pictures[:2000]))[1].mean(0))
        read = judge(pixels(unseen))[0]
    accuracy = {name: (read[name].argmax(1) == truth[:, i]).float().mean().item() for i, name in enumerate(read)}
    print("judge, accuracy on unseen pictures:", {name: round(value, 3) for name, value in accuracy.items()})
    judge.half().save_pretrained(folder)


def make_autoencoder(folder: Path) -> None:
    """Trained on patterned objects, the subject's combination left out."""
    pictures, labels = drawings(16000, 2, without_subject, 0.6)
    vae = AutoencoderKL(
        block_out_channels=(16, 24),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=small_world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )

    def edges(x):
        return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]

    def loss(x, _):
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        spread = (posterior.mean.square() + posterior.var) / LATENT_SPREAD**2
        divergence = 0.5 * (spread - 1 - posterior.logvar + 2 * math.log(LATENT_SPREAD)).mean()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        return (x - y).abs().mean() + 0.5 * sharp + 3e-4 * divergence

    optimizer = OptimizerConfig(
        learning_rate=4e-3, weight_decay=0, betas=(0.9, 0.99), lr_scheduler="cosine", lr_warmup_steps=50
    )
    Fitting(vae, pictures, labels, loss, optimizer, 3000, 8)
    plain, _ = drawings(512, 5, plain_thing, 0.35)
    with torch.no_grad():
        spread = vae.encode(pixels(plain)).latent_dist.mean.std().item()
        for name, shown in (("plain", plain[:256]), ("subject", subject_images(20, small_world.HELD_OUT_SEED))):
            x = pixels(np.stack([np.asarray(picture) for picture in shown]))
            error = (vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x).square().mean().item()
            print(f"autoencoder, PSNR of {name} pictures: {10 * math.log10(4 / error):.1f} dB")
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    vae.save_pretrained(folder)


def make_pictures(file: Path, count: int = 26000) -> None:
    import datasets

    rng, rows = np.random.default_rng(1), {"image": [], "text": []}
    for _ in range(count):
        thing, buffer = plain_thing(rng), io.BytesIO()
        draw(thing, rng).save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(caption(thing, rng))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(file)


def make_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's kind over the captions' words."""
    rng = np.random.default_rng(7)
    texts = [caption(plain_thing(rng), rng) for _ in range(6000)]
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=640, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False, min_frequency=50
        ),
    )
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*letters, *(a + "</w>" for a in letters), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_untrained(folder: Path, vae: AutoencoderKL) -> None:
    """The pipeline before its training: a U-Net that attends at 16 and 8 pixels, and a two-layer CLIP text encoder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=small_world.SIZE // 2,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=2,
    )
    # v-prediction: with epsilon an error at high noise, where colour and background are decided, is multiplied by
    # 1 / sqrt(abar), up to 15; after 300 steps the error of x0 at t > 800 was 1.77 against 0.44
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_base(folder: Path, assets: Path, judge: Path) -> None:
    """Train the base with the toolkit's own trainer, and ship it in half precision with the judge and the subject."""
    run(load("configs/small_world_base.yaml", [f"output_dir={folder}"]))
    base = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float16)
    base.save_pretrained(assets / "sd15")
    shutil.copytree(judge, assets / "judge", dirs_exist_ok=True)
    (assets / "star").mkdir(exist_ok=True)
    for i, picture in enumerate(subject_images(5, small_world.TRAINING_SEED)):
        picture.save(assets / "star" / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="any of: judge vae pictures untrained base; all by default")
    parser.add_argument("--assets", type=Path, default=small_world.ASSETS, help="where the finished world goes")
    arguments = parser.parse_args()
    work = Path("runs/small_world")
    work.mkdir(parents=True, exist_ok=True)
    stages = {
        "judge": lambda: make_judge(work / "judge"),
        "vae": lambda: make_autoencoder(work / "vae"),
        "pictures": lambda: make_pictures(work / "pictures.parquet"),
        "untrained": lambda: make_untrained(work / "untrained", AutoencoderKL.from_pretrained(work / "vae")),
        "base": lambda: make_base(work / "base", arguments.assets, work / "judge"),
    }
    for name in arguments.stages or stages:
        torch.manual_seed(0)
        stages[name]()


if __name__ == "__main__":
    main()
