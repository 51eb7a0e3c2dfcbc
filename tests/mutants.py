"""Break one line of the toolkit at a time, and see which test notices.

python tests/mutants.py          (every fault)
python tests/mutants.py shift t5 (those whose file or name has one of these words)

Exit status 1: the tests fail without a fault, a fault survives, or its line is no longer there.
"""

import gc
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # a file under trainers/ to the tests that should notice
    "from_scratch/codes.py": ["test_autoencoder.py"],
    "autoencoder.py": ["test_autoencoder.py", "test_from_scratch.py"],
    "config/dreambooth.py": ["test_config.py", "test_families.py"],
    "data/dreambooth_batches.py": ["test_data.py", "test_families.py"],
    "data/encoder_cache.py": ["test_cache.py", "test_families.py"],
    "data/rng.py": ["test_objectives.py", "test_data.py"],
    "distributed/trained_weights.py": ["test_from_scratch.py", "test_faults.py"],
    "dreambooth.py": ["test_families.py"],
    "families/base.py": ["test_families.py"],
    "base_model.py": ["test_families.py"],
    "families/sd3.yaml": ["test_formats.py"],
    "families/flux.yaml": ["test_families.py", "test_config.py"],
    "config/dreambooth_rules.py": ["test_config.py", "test_families.py"],
    "families/flux.py": ["test_families.py"],
    "families/objectives.py": ["test_objectives.py"],
    "families/sampling.py": ["test_families.py"],
    "families/sd15.py": ["test_families.py"],
    "families/sd3.py": ["test_families.py"],
    "from_scratch/adversarial.py": ["test_gan.py"],
    "from_scratch/augment.py": ["test_unet.py", "test_gan.py"],
    "from_scratch/image_sets.py": ["test_from_scratch.py", "test_unet.py"],
    "from_scratch/tiling.py": ["test_unet.py"],
    "from_scratch/uses/colorize.py": ["test_unet.py"],
    "from_scratch/uses/restore.py": ["test_unet.py"],
    "from_scratch/uses/segment.py": ["test_unet.py"],
    "gan.py": ["test_gan.py"],
    "lora/export.py": ["test_families.py", "test_formats.py"],
    "lora/base_layers.py": ["test_formats.py"],
    "lora/files.py": ["test_formats.py"],
    "lora/kohya.py": ["test_formats.py"],
    "lora/layers.py": ["test_families.py"],
    "lora/low_rank.py": ["test_formats.py"],
    "lora/peft_format.py": ["test_formats.py"],
    "lora/update.py": ["test_formats.py"],
    "metrics/image_quality.py": ["test_gan.py", "test_unet.py"],
    "training/optimizers.py": ["test_from_scratch.py", "test_faults.py"],
}
FAULTS = [  # file, what is wrong, the line's text, the text that replaces it
    # Objectives
    ("families/objectives.py", "target's sign", "return eps - x0", "return x0 - eps"),
    (
        "families/objectives.py",
        "signal and noise swapped",
        "(1 - t) * x0 + t * eps",
        "t * x0 + (1 - t) * eps",
    ),
    (
        "families/objectives.py",
        "logit mean's sign",
        "self.logit_mean + self.logit_std",
        "-self.logit_mean + self.logit_std",
    ),
    ("families/objectives.py", "logit std lost", "self.logit_std * torch.special", "torch.special"),
    ("families/objectives.py", "mode's u lost", "square() - 1 + u)", "square() - 1)"),
    (
        "families/objectives.py",
        "cosmap without half of pi",
        "torch.tan(torch.pi / 2 * u)",
        "torch.tan(torch.pi / 4 * u)",
    ),
    (
        "families/objectives.py",
        "shift inverted",
        "self.shift * t / (1 + (self.shift - 1) * t)",
        "t / (self.shift - (self.shift - 1) * t)",
    ),
    ("families/objectives.py", "ends not cut", ".clamp(1e-4, 1 - 1e-6)", ""),
    (
        "families/objectives.py",
        "precondition by t, not t^2",
        "scale = t.square() if",
        "scale = t if",
    ),
    (
        "families/objectives.py",
        "sigma_sqrt by 1 / t",
        "return scale / t.square()",
        "return scale / t",
    ),
    (
        "families/objectives.py",
        "cosmap weight's square",
        "(1 - 2 * t + 2 * t.square())",
        "(1 - 2 * t + t.square())",
    ),
    (
        "families/objectives.py",
        "cosmap weight forgets precondition",
        "return scale * 2 / (torch.pi",
        "return 2 / (torch.pi",
    ),
    ("families/objectives.py", "static shift not told", 'return scheduler["shift"]', "return 1.0"),
    (
        "families/objectives.py",
        "dynamic shift's origin",
        'slope * (tokens - scheduler["base_image_seq_len"])',
        "slope * tokens",
    ),
    (
        "families/objectives.py",
        "dynamic shift without exp",
        "return math.exp(scheduler",
        "return 1.0 * (scheduler",
    ),
    ("families/objectives.py", "min-SNR of v without + 1", "else snr + 1", "else snr"),
    (
        "families/objectives.py",
        "min-SNR as a maximum",
        "max=self.snr_gamma) / scale",
        "max=1e9) / scale",
    ),
    (
        "families/objectives.py",
        "debiased without root",
        "snr.clamp(min=1e-3).sqrt() / scale",
        "snr.clamp(min=1e-3) / scale",
    ),
    (
        "families/objectives.py",
        "v's sign",
        "return signal * eps - noise * x0",
        "return noise * x0 - signal * eps",
    ),
    # Formats
    ("lora/kohya.py", "halves as they are", "b.roll(len(b) // 2, 0)", "b"),
    (
        "lora/kohya.py",
        "kohya's alpha ignored",
        "b = b * (tensors",
        "b = 0 * b + b if 1 else (tensors",
    ),
    (
        "families/sd3.yaml",
        "keys before queries",
        "attn2.qkv: attn2.to_q attn2.to_k attn2.to_v",
        "attn2.qkv: attn2.to_k attn2.to_q attn2.to_v",
    ),
    ("lora/update.py", "parts side by side", "column += update.rank", "column += 0"),
    (
        "lora/peft_format.py",
        "alpha beside ignored",
        'if f"{name}.alpha" in state else alpha',
        "if False else alpha",
    ),
    ("lora/peft_format.py", "rank of the first layer", "if update.rank != common_rank", "if False"),
    (
        "lora/files.py",
        "strangers counted as read",
        "        if name in layers:",
        "        if True:",
    ),
    (
        "lora/base_layers.py",
        "merged twice",
        "exact = weight.double() + product",
        "exact = weight.double() + 2 * product",
    ),
    ("lora/low_rank.py", "the last value lost", "s[rank:]", "s[rank + 1 :]"),
    ("lora/low_rank.py", "singular values twice", "s[:rank].sqrt()", "s[:rank]"),
    # Draws
    (
        "data/rng.py",
        "a row's stream by its place",
        "            for row in self.rows\n        ]\n",
        "            for row in range(len(self.rows))\n        ]\n",
    ),
    ("data/rng.py", "pools in the same parts", 'self.step, pool, "strata"', 'self.step, "strata"'),
    (
        "data/rng.py",
        "parts in order",
        "self.global_batch_size)[position]",
        "self.global_batch_size)[position] * 0 + position",
    ),
    # Families
    (
        "families/base.py",
        "latents' scale divides",
        '* self.vae_config["scaling_factor"]',
        '/ self.vae_config["scaling_factor"]',
    ),
    (
        "families/base.py",
        "latents' shift added",
        "return (z - shift) *",
        "return (z + shift) *",
    ),
    (
        "families/base.py",
        "posterior's variance for its std",
        "(0.5 * logvar.clamp",
        "(logvar.clamp",
    ),
    (
        "base_model.py",
        "defaults of config files lost",
        'return self.meta_model("vae").config',
        "return {'scaling_factor': 1.0} | diffusers.AutoencoderKL.load_config(self.folder / 'vae')",
    ),
    (
        "families/base.py",
        "a latent for a token",
        "// self.vae_scale_factor // 2) ** 2",
        "// self.vae_scale_factor) ** 2",
    ),
    (
        "families/base.py",
        "shift: none is auto",
        '"none": 1.0}',
        '"none": resolution_shift(self.scheduler.config, tokens)}',
    ),
    (
        "families/base.py",
        "max_sequence_length ignored",
        "model.max_sequence_length or tokens",
        "tokens",
    ),
    (
        "families/base.py",
        "T5 reads what its tokenizer can",
        "self.max_sequence_length if name == self.t5_encoder else tokenizer.model_max_length",
        "tokenizer.model_max_length",
    ),
    (
        "base_model.py",
        "a T5 that is left out loads",
        "left_out = model.text_encoder_3 is None and",
        "left_out = False and",
    ),
    (
        "lora/layers.py",
        "LoRA lacks out_proj of the text encoders",
        '"v_proj", "out_proj"]',
        '"v_proj"]',
    ),
    ("families/flux.py", "t multiplied by 1000", "timestep=t,", "timestep=1000 * t,"),
    (
        "families/flux.py",
        "token order (dy, dx, c)",
        "F.pixel_unshuffle(x_t, 2).flatten(2).mT",
        "F.pixel_unshuffle(x_t, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, "
        "2).flatten(2).mT",
    ),
    (
        "families/flux.py",
        "rows and columns swapped",
        "cartesian_prod(zero, y, x)",
        "cartesian_prod(zero, y, x)[:, [0, 2, 1]]",
    ),
    ("families/flux.py", "text ids not zero", "txt_ids=x_t.new_zeros(", "txt_ids=x_t.new_ones("),
    (
        "families/flux.py",
        "guidance dropped",
        "torch.full_like(t, self.guidance)",
        "torch.zeros_like(t)",
    ),
    (
        "families/flux.py",
        "pooled text of the first token",
        "output.pooler_output",
        "output.last_hidden_state[:, 0]",
    ),
    (
        "families/flux.py",
        "schnell unasked",
        "if self.guidance is None and not model.allow_schnell:",
        "if False:",
    ),
    (
        "families/flux.yaml",
        "preset lacks proj_mlp",
        "ff_context.net.2, proj_mlp, ",
        "ff_context.net.2, ",
    ),
    ("families/sd3.py", "t not multiplied by 1000", "timestep=1000 * t", "timestep=t"),
    (
        "families/sd3.py",
        "CLIP's last layer",
        "output.hidden_states[-2]",
        "output.hidden_states[-1]",
    ),
    (
        "families/sd3.py",
        "pooled order swapped",
        'text[f"{name}_pooled"] for name in self.clip_encoders]',
        'text[f"{name}_pooled"] for name in self.clip_encoders[::-1]]',
    ),
    (
        "families/sd3.py",
        "CLIP order swapped",
        "text[name] for name in self.clip_encoders]",
        "text[name] for name in self.clip_encoders[::-1]]",
    ),
    ("families/sd3.py", "T5 before CLIP", "torch.cat([clip, t5], 1)", "torch.cat([t5, clip], 1)"),
    (
        "families/sd3.py",
        "CLIP padded on the left",
        "(0, width - clip.shape[-1])",
        "(width - clip.shape[-1], 0)",
    ),
    (
        "families/sd3.py",
        "no room for a T5 left out",
        "(len(clip), self.max_sequence_length, width)",
        "(len(clip), 0, width)",
    ),
    (
        "families/sampling.py",
        "guided away from the prompt",
        "encode_for_pipeline(family, validation.negative_prompt, encode)",
        "encode_for_pipeline(family, prompt, encode)",
    ),
    ("families/sd15.py", "noise_offset lost", '"debiased", "noise_offset"}', '"debiased"}'),
    # Steps
    (
        "dreambooth.py",
        "objective's weight lost",
        'batch["weight"] * self.objective.weight(t) * error',
        'batch["weight"] * error',
    ),
    (
        "dreambooth.py",
        "pictures' weight lost",
        'batch["weight"] * self.objective',
        "0.5 * self.objective",
    ),
    (
        "dreambooth.py",
        "no new noise",
        "return x0, self.objective.noise(x0, rng)",
        "return x0, x0.roll(1)",
    ),
    (
        "dreambooth.py",
        "T5 trains beside the denoiser",
        "family.load(*names, *encoder.loaded_encoders)",
        "family.load(*names, *family.text_encoder_names)",
    ),
    (
        "families/sampling.py",
        "T5 draws class pictures",
        'family.load("vae", family.denoiser_name, *encoder.loaded_encoders)',
        'family.load("vae", family.denoiser_name, *family.text_encoder_names)',
    ),
    ("dreambooth.py", "trained model kept", "self.players.clear()", "pass"),
    (
        "data/dreambooth_batches.py",
        "prior weight lost",
        "[1.0, self.config.prior_loss_weight]",
        "[1.0, 1.0]",
    ),
    (
        "data/dreambooth_batches.py",
        "captions never dropped",
        '"" if is_dropped else picture.caption',
        "picture.caption",
    ),
    (
        "data/encoder_cache.py",
        "T5's length not in the key",
        "self.family.max_sequence_length if name == self.family.t5_encoder else None",
        "None",
    ),
    ("data/encoder_cache.py", "encoders stay in memory", "family.unload()", "pass"),
    # LoRA and its file
    (
        "lora/layers.py",
        "alpha ignored",
        "lora_alpha=config.alpha or config.rank",
        "lora_alpha=config.rank",
    ),
    (
        "lora/layers.py",
        "a regex matches anywhere",
        "re.fullmatch(requested, name)",
        "re.search(requested, name)",
    ),
    (
        "lora/layers.py",
        "a preset reaches beyond the blocks",
        "facts.is_in_block(name) and ends_with(",
        "ends_with(",
    ),
    (
        "lora/layers.py",
        "all-linear takes convolutions",
        "for name in layers if isinstance(module.get_submodule(name), nn.Linear)",
        "for name in layers",
    ),
    (
        "lora/layers.py",
        "blocks by the beginning of a name",
        'name.startswith(tuple(f"{block}." for block in blocks))',
        "name.startswith(tuple(blocks))",
    ),
    (
        "lora/layers.py",
        "near names without suffixes",
        '(".".join(parts[i:]), ".".join(parts[: i + 1]))',
        '(".".join(parts[: i + 1]),)',
    ),
    (
        "lora/export.py",
        "LoRA's scale not folded",
        "tensor = tensor * scale",
        "pass",
    ),
    (
        "lora/export.py",
        "scale of rslora forgotten",
        "config.r**0.5 if config.use_rslora else config.r",
        "config.r",
    ),
    (
        "lora/base_layers.py",
        "CLIP's level lost",
        '"" if has_level else "text_model."',
        '""',
    ),
    # What does not fit
    (
        "families/flux.yaml",
        "Flux.1 takes text_encoder_3",
        "guidance_scale, allow_schnell]",
        "guidance_scale, allow_schnell, text_encoder_3]",
    ),
    (
        "config/dreambooth_rules.py",
        "flows take multiples of 8",
        "config.data.resolution % facts.pixel_multiple:",
        "config.data.resolution % 8:",
    ),
    # Small networks
    (
        "from_scratch/codes.py",
        "noise in half units",
        "x + 2 * config.objective.noise",
        "x + config.objective.noise",
    ),
    ("autoencoder.py", "divergence's sign", "- 1 - logvar).mean() / 2", "- 1 + logvar).mean() / 2"),
    (
        "autoencoder.py",
        "anomalies are the learnt class",
        "roc_auc_score(~is_normal.cpu()",
        "roc_auc_score(is_normal.cpu()",
    ),
    (
        "from_scratch/adversarial.py",
        "relativistic loss turned round",
        "softplus(m - r).mean()",
        "softplus(r - m).mean()",
    ),
    ("from_scratch/adversarial.py", "hinge without margin", "relu(1 - r)", "relu(-r)"),
    ("gan.py", "penalty at every step", "if rng.step % objective.penalty_every:", "if False:"),
    ("gan.py", "lazy penalty not scaled", "return objective.penalty_every * total", "return total"),
    (
        "gan.py",
        "R2 at real pictures",
        "(objective.r2 / 2, generated, 0)",
        "(objective.r2 / 2, x, 0)",
    ),
    (
        "gan.py",
        "WGAN-GP wants no slope",
        "objective.gradient_penalty, between, 1",
        "objective.gradient_penalty, between, 0",
    ),
    (
        "from_scratch/adversarial.py",
        "both learn in the generator's turn",
        "module.requires_grad_(False)",
        "module.requires_grad_(True)",
    ),
    (
        "gan.py",
        "diversity inverted",
        "generated.std(0).mean() / (x.std(0).mean() + 1e-6)",
        "x.std(0).mean() / (generated.std(0).mean() + 1e-6)",
    ),
    ("metrics/image_quality.py", "a point is its own neighbour", "kthvalue(k + 1)", "kthvalue(k)"),
    (
        "metrics/image_quality.py",
        "recall is precision",
        '"recall": coverage(b, a)',
        '"recall": coverage(a, b)',
    ),
    (
        "metrics/image_quality.py",
        "ignored pixels count",
        "known = truth != ignored",
        "known = truth == truth",
    ),
    (
        "metrics/image_quality.py",
        "sharpness inverted",
        "edges(generated) / edges(true)",
        "edges(true) / edges(generated)",
    ),
    (
        "from_scratch/augment.py",
        "masks bent smoothly",
        'mode="nearest", padding',
        'mode="bilinear", padding',
    ),
    ("from_scratch/augment.py", "bent by half", "grid + 2 * sigma", "grid + sigma"),
    ("from_scratch/augment.py", "never turned", "(4 * rng.uniform())", "(0 * rng.uniform())"),
    (
        "from_scratch/uses/segment.py",
        "ignored pixels in the loss",
        "known = y != IGNORE_INDEX",
        "known = y == y",
    ),
    (
        "from_scratch/uses/segment.py",
        "Dice without its 2",
        "(2 * (share * truth).sum",
        "((share * truth).sum",
    ),
    (
        "from_scratch/uses/restore.py",
        "restored the wrong way",
        "return x, true - x",
        "return x, x - true",
    ),
    (
        "from_scratch/uses/colorize.py",
        "colours cut, not drawn to grey",
        "& (trial <= 1)",
        "& (trial <= 1) | (trial == 1)",
    ),
    (
        "from_scratch/uses/colorize.py",
        "bins are not weighted",
        "nearest_bin(y), self.bin_weights, ",
        "nearest_bin(y), ",
    ),
    (
        "from_scratch/tiling.py",
        "tiles not weighted",
        "weight[window_index] += window",
        "weight[window_index] += 1",
    ),
    ("from_scratch/tiling.py", "last tile left out", ", length - tile})", "})"),
    (
        "from_scratch/image_sets.py",
        "folds overlap",
        "== config.fold) == held_out",
        "!= config.fold) == held_out",
    ),
    (
        "from_scratch/image_sets.py",
        "always the first corner",
        "r.randrange(length - side + 1)",
        "0 * r.randrange(length - side + 1)",
    ),
    (
        "training/optimizers.py",
        "gradient not clipped",
        "(norm / max_norm).clamp(min=1)",
        "norm / norm.clamp(min=1e-9)",
    ),
    (
        "training/optimizers.py",
        "some gradients forgotten",
        "[p.grad for p in trained if p.grad is not None]",
        "[p.grad for p in trained if p.grad is not None][:1]",
    ),
    (
        "distributed/trained_weights.py",
        "buffers not resumed",
        "if any(n.startswith(owner)",
        "if False and any(n.startswith(owner)",
    ),
]
LIBRARIES = [  # imported once, and inherited by every child
    "accelerate",
    "datasets",
    "peft",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
]


class FirstFailure:
    """A pytest plugin."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")

    pytest_collectreport = pytest_runtest_logreport


def judge(root: Path, tests: list[str], answer: Connection) -> None:
    """In a child: the name of the first failing test of the copy in `root`, or "" when all pass."""
    os.chdir(root)
    os.environ["PYTHONPATH"] = sys.path[0] = str(root)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import trainers

    assert Path(trainers.__file__).is_relative_to(root), trainers.__file__
    first = FirstFailure()
    status = pytest.main(
        ["-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)], [first]
    )
    answer.send(first.name or ("" if status == 0 else f"pytest ended with {status!r}"))


def first_failure(root: Path, tests: list[str]) -> str:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=judge, args=(root, tests, theirs))
    child.start()
    theirs.close()
    name = ours.recv()
    child.join()
    return name


def tests_of(file: str) -> list[str]:
    return TESTS[file]


def main(words: list[str]) -> int:
    faults = [
        fault for fault in FAULTS if not words or any(word in " ".join(fault[:2]) for word in words)
    ]
    for name in LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = (
        True  # two faults of one length within one second would share their bytecode
    )
    gc.freeze()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(
            ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
        )
        needed = sorted({test for file, *_ in faults for test in tests_of(file)})
        if failed := first_failure(root, needed):
            print(f"without any fault, {failed} fails")
            return 1
        for file, name, old, new in faults:
            path, start = root / "trainers" / file, time.perf_counter()
            text = path.read_text()
            if text.count(old) != 1:
                verdict = f"NOT APPLIED: its text is there {text.count(old)} times"
            else:
                path.write_text(text.replace(old, new))
                failed = first_failure(root, tests_of(file))
                path.write_text(text)
                verdict = f"caught by {failed}" if failed else "SURVIVED"
            bad += not verdict.startswith("caught")
            print(
                f"{file:17} {name:40} {time.perf_counter() - start:4.0f} s  {verdict}", flush=True
            )
    print(f"{len(faults) - bad} of {len(faults)} caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
