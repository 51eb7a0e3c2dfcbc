"""Make the small world from nothing: pictures, judge, autoencoder, tokenizers, three bases, and the
shipped assets.

python scripts/small_world/build.py            (everything, some hours on two cores)
python scripts/small_world/build.py judge vae  (some stages)
"""

import io
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_world import world as small_world
from small_world.judge import Judge
from small_world.world import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    caption,
    draw,
    is_subject,
    plain_thing,
    rich_thing,
    subject_images,
)
from trainers.cli import make_parser
from trainers.config import OptimizerConfig, TrainConfig
from trainers.config.loading import load_config
from trainers.data.rng import SampleRng, derive_seed
from trainers.families import FAMILIES
from trainers.run import run
from trainers.run_folder import PIPELINE
from trainers.training.loop import Player, train
from trainers.training.optimizers import EMA, make_lr_schedule, make_optimizer

LATENT_SPREAD = 4.0  # the latents' wanted standard deviation, so that scaling_factor matters
TOKENS = 16
STEPS = {"sd15": 8000, "sd3": 5000, "flux": 6000}
FLOW = [
    f"model.max_sequence_length={TOKENS}",
    "objective.debiased=false",
    "train.train_batch_size=24",
]


class FitTask:
    """A task for the loop: one module, one loss of random batches of uint8 pictures with labels."""

    def __init__(
        self, module, pictures, labels, loss, config: OptimizerConfig, steps: int, batch: int
    ) -> None:
        self.pictures, self.labels, self.loss, self.batch = pictures, labels, loss, batch
        optimizer = make_optimizer(
            config, [{"params": list(module.parameters()), "lr": config.learning_rate}]
        )
        self.players = {"model": Player(module, optimizer, EMA(module, 0.99))}
        rate, settings = make_lr_schedule(config, steps), TrainConfig(max_train_steps=steps)
        train(self, self.batches, settings, 0, Accelerator(cpu=True), rate, [self.report])
        self.players["model"].ema.swap()
        module.eval()

    def batches(self, step):
        r = torch.Generator().manual_seed(derive_seed("fitting", step))
        index = torch.randint(len(self.pictures), (self.batch,), generator=r)
        yield (
            (pixels(self.pictures[index]), self.labels[index]),
            SampleRng(0, step, range(self.batch)),
        )

    def losses(self, batch, rng):
        yield "model", self.loss(*batch)

    def report(self, step, metrics):
        if step % 200 == 0:
            print(f"step {step}  loss {metrics['model_loss'].item():.4f}", flush=True)


def pixels(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawings(count, seed, thing, jitter):
    """Arrays of pictures (N, H, W, 3) and labels (N, 6)."""
    rng, pictures, labels = np.random.default_rng(seed), [], []
    while len(pictures) < count:
        item = thing(rng)
        pictures.append(np.asarray(draw(item, rng, jitter)))
        labels.append(item.labels())
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
        return sum(
            F.cross_entropy(logits, y[:, i]) for i, logits in enumerate(judge(x)[0].values())
        )

    FitTask(
        judge,
        pictures,
        labels,
        loss,
        OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine"),
        1600,
        64,
    )
    unseen, truth = drawings(1500, 4, rich_thing, 0.6)
    with torch.no_grad():
        judge.centre.copy_(judge(pixels(pictures[:2000]))[1].mean(0))
        read = judge(pixels(unseen))[0]
    accuracy = {
        name: (read[name].argmax(1) == truth[:, i]).float().mean().item()
        for i, name in enumerate(read)
    }
    print(
        "judge, accuracy on unseen pictures:",
        {name: round(value, 3) for name, value in accuracy.items()},
    )
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
        learning_rate=4e-3,
        weight_decay=0,
        betas=(0.9, 0.99),
        lr_scheduler="cosine",
        lr_warmup_steps=50,
    )
    FitTask(vae, pictures, labels, loss, optimizer, 3000, 8)
    plain, _ = drawings(512, 5, plain_thing, 0.35)
    with torch.no_grad():
        spread = vae.encode(pixels(plain)).latent_dist.mean.std().item()
        for name, images in (
            ("plain", plain[:256]),
            ("subject", subject_images(20, small_world.HELD_OUT_SEED)),
        ):
            x = pixels(np.stack([np.asarray(picture) for picture in images]))
            error = (
                (vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x)
                .square()
                .mean()
                .item()
            )
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
    words = pre_tokenizers.Split(
        Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=640,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
            show_progress=False,
            min_frequency=50,
        ),
    )
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [
        *letters,
        *(a + "</w>" for a in letters),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_t5_tokenizer() -> T5Tokenizer:
    """A piece for each word of the captions; unknown words are spelt in letters."""
    words = sorted({"a", "photo", "of", *COLORS, *CLASSES, *" ".join(BACKGROUNDS).split()})
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -6.0),
        *((f"▁{word}", -2.0) for word in words),
    ]
    pieces += [(letter, -8.0) for letter in map(chr, range(33, 127))]
    return T5Tokenizer(vocab=list(dict(pieces).items()), extra_ids=0, model_max_length=512)


def make_clip(tokenizer: CLIPTokenizer, width: int, kind=CLIPTextModel) -> CLIPTextModel:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def make_sd15(folder: Path, vae: AutoencoderKL) -> None:
    """A U-Net that attends at 16 and 8 pixels, and a two-layer CLIP text encoder."""
    tokenizer = make_tokenizer()
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
    # v-prediction: with epsilon an error at high noise, where colour and background are decided, is
    # multiplied by
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
        text_encoder=make_clip(tokenizer, 64),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_sd3(folder: Path, vae: AutoencoderKL) -> None:
    """Four joint blocks, the first with a second attention as in SD3.5-medium."""
    clip, t5 = make_tokenizer(), make_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=small_world.SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=3,
        joint_attention_dim=48,
        caption_projection_dim=72,
        pooled_projection_dim=48,
        pos_embed_max_size=small_world.SIZE // 4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_clip(clip, 24, CLIPTextModelWithProjection),
        tokenizer=clip,
        text_encoder_2=make_clip(clip, 24, CLIPTextModelWithProjection),
        tokenizer_2=clip,
        text_encoder_3=make_t5(t5, 48),
        tokenizer_3=t5,
    ).save_pretrained(folder)


def make_flux(folder: Path, vae: AutoencoderKL) -> None:
    """Two double and three single blocks, with a guidance embedding as Flux.1-dev."""
    clip, t5 = make_tokenizer(), make_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=3,
        joint_attention_dim=48,
        pooled_projection_dim=48,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=make_clip(clip, 48),
        tokenizer=clip,
        text_encoder_2=make_t5(t5, 48),
        tokenizer_2=t5,
    ).save_pretrained(folder)


def make_untrained(family: str, folder: Path, vae: AutoencoderKL) -> None:
    """The pipeline before its training. The flows' autoencoder also shifts its latents, as SD3's
    and Flux.1's do."""
    torch.manual_seed(0)
    if family != "sd15":
        plain, _ = drawings(512, 5, plain_thing, 0.35)
        with torch.no_grad():
            latents = vae.encode(pixels(plain)).latent_dist.mean
        scale, shift = round(1 / latents.std().item(), 4), round(latents.mean().item(), 4)
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    {"sd15": make_sd15, "sd3": make_sd3, "flux": make_flux}[family](folder, vae)


def make_family(family: str, work: Path, assets: Path) -> None:
    if not (work / f"untrained_{family}").exists():
        make_untrained(
            family, work / f"untrained_{family}", AutoencoderKL.from_pretrained(work / "vae")
        )
    make_base(family, work, assets)


def make_base(family: str, work: Path, assets: Path) -> None:
    """Train a base with the toolkit's own trainer, and ship it in half precision with the judge and
    the subject."""
    overrides = [] if family == "sd15" else [*FLOW]
    places = [
        f"model.pretrained_model_name_or_path={work}/untrained_{family}",
        f"output_dir={work}/base_{family}",
    ]
    overrides += [f"model.family={family}", f"train.max_train_steps={STEPS[family]}"]
    settings = load_config("configs/small_world_base.yaml", [*places, *overrides])
    run(settings)
    pipeline = FAMILIES[family].pipeline.from_pretrained(
        settings.output_dir / PIPELINE, dtype=torch.float16
    )
    pipeline.save_pretrained(assets / family)
    judge = work / "judge"
    shutil.copytree(judge, assets / "judge", dirs_exist_ok=True)
    (assets / "star").mkdir(exist_ok=True)
    for i, picture in enumerate(subject_images(5, small_world.TRAINING_SEED)):
        picture.save(assets / "star" / f"{i}.png")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "stages", nargs="*", help="any of: judge vae pictures sd15 sd3 flux; all by default"
    )
    parser.add_argument(
        "--assets", type=Path, default=small_world.ASSETS, help="where the finished world goes"
    )
    arguments = parser.parse_args()
    work = Path("runs/small_world")
    work.mkdir(parents=True, exist_ok=True)
    stages = {
        "judge": lambda: make_judge(work / "judge"),
        "vae": lambda: make_autoencoder(work / "vae"),
        "pictures": lambda: make_pictures(work / "pictures.parquet"),
    }
    for family in FAMILIES:
        stages[family] = partial(make_family, family, work, arguments.assets)
    for name in arguments.stages or stages:
        torch.manual_seed(0)
        stages[name]()


if __name__ == "__main__":
    main()
