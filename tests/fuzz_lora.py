"""LoRA files of every format and of other kinds, damaged at random: each is read or refused.

python tests/fuzz_lora.py [--cases 400] [--seed 0] [--only NUMBER]

What is read must have every layer that the undamaged file had, in finite numbers, which are equal
where the file is undamaged; it must go into our other formats and come back equal. Exit
status 1 for a traceback, a hang, a program that is started, or a file that is taken otherwise.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tests.shared import fuzzing
from tests.shared.fuzzing import CONTENT_DAMAGE, Case, replace_path
from tests.shared.lora_files import random_lora
from tests.shared.loras_to_damage import make_files
from tests.shared.tiny_pipelines import MAKERS
from trainers.config import ModelConfig
from trainers.families import FAMILIES, Family
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, load_format
from trainers.lora.update import Lora, max_relative_difference

SECONDS_PER_CASE = 30
TOLERANCE = 1e-5

State = dict[str, Tensor]
Damage = Callable[[Path, random.Random], str]


# Damage


def tensors_of(path: Path) -> Path:
    return next(path.rglob("*.safetensors")) if path.is_dir() else path


def leave_alone(path: Path, rng: random.Random) -> str:
    """A file without damage, under another name."""
    return "nothing"


def damage_content(path: Path, rng: random.Random) -> str:
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    file = rng.choice([file for file in files if file.is_file()])
    change = rng.choice(CONTENT_DAMAGE)
    file.write_bytes(change(file.read_bytes(), rng))
    return f"{change.__name__} {file.name}"


def replace_file(path: Path, rng: random.Random) -> str:
    return replace_path(tensors_of(path), rng)


def change_tensor(path: Path, rng: random.Random) -> str:
    """Another value, shape, type or name of one tensor, or no tensor of that name."""
    file = tensors_of(path)
    state = load_file(file)
    key = rng.choice(sorted(state))
    old = state.pop(key)
    shape = list(old.shape)
    changes = {
        "removed": None,
        "NaN": torch.full_like(old, float("nan")),
        "infinite": torch.full_like(old, float("inf")),
        "huge": torch.full_like(old, torch.finfo(old.dtype).max),
        "tiny": torch.full_like(old, torch.finfo(old.dtype).tiny),
        "empty": torch.zeros(0),
        "number": torch.tensor(-1.0),
        "rank 0": torch.zeros(0, *shape[1:]),
        "wider": torch.ones([*shape, 2]),
        "longer": torch.ones([size + 1 for size in shape]),
        "transposed": old.T.contiguous() if old.ndim == 2 else torch.ones(3, 3),
        "integers": torch.ones(shape, dtype=torch.int64),
        "truth values": torch.ones(shape, dtype=torch.bool),
        "five axes": torch.ones(1, 1, 1, 1, 1),
    }
    name = rng.choice(sorted(changes))
    if changes[name] is not None:
        state[key] = changes[name]
    if not state:
        state["x"] = torch.ones(1)
    save_file(state, file)
    return f"{name} {key}"


def change_names(path: Path, rng: random.Random) -> str:
    """Names of another model, another program, or of nothing; or the same layer twice."""
    file = tensors_of(path)
    state = load_file(file)
    key = rng.choice(sorted(state))
    kind = rng.randrange(6)
    if kind == 0:
        state[f"{key}.again"] = state[key].clone()
    elif kind == 1:
        state = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    elif kind == 2:
        state[key.replace(".weight", "")] = state.pop(key)
    elif kind == 3:
        state[rng.choice(("", "\x00", "a" * 10_000, "é" * 50, "../../x", "__metadata__ "))] = (
            torch.ones(1)
        )
    elif kind == 4:
        state = {name.upper(): value for name, value in state.items()}
    else:
        other = rng.choice(sorted(state))
        state[key], state[other] = state[other], state[key]
    save_file(state, file)
    return f"names {kind} {key}"


BOMB = json.dumps({"lora_alpha": 10**400})
METADATA = (
    {"lora_adapter_metadata": "["},
    {"lora_adapter_metadata": "[" * 50_000},
    {"lora_adapter_metadata": "null"},
    {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'},
    {"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'},
    {"lora_adapter_metadata": '{"unet.r": 0, "unet.lora_alpha": 0}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(a+)+$": 1}}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'},
    {"lora_adapter_metadata": '{"unet.alpha_pattern": {"a": null}}'},
    {"lora_adapter_metadata": '{"unet.use_rslora": "yes"}'},
    {"lora_adapter_metadata": '{"unet.peft_type": ["LORA"]}'},
    {"lora_adapter_metadata": '{"unet.init_lora_weights": {"a": 1}}'},
    {"lora_adapter_metadata": BOMB.replace("lora_alpha", "unet.lora_alpha")},
    {"lora_adapter_metadata": "9" * 10_000},
    {"ss_network_args": "x" * 2_000_000},
    {"format": "\x00", "": ""},
    {f"key{i}": "x" * 100 for i in range(5000)},
)


def change_metadata(path: Path, rng: random.Random) -> str:
    file = tensors_of(path)
    number = rng.randrange(len(METADATA))
    save_file(load_file(file), file, METADATA[number])
    return f"metadata {number}"


HEADERS = (
    {"__metadata__": 3, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [10**20], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**18]}},
    {"x": {"dtype": "F32", "shape": "1", "data_offsets": None}},
    {"x": None},
    {"x": []},
    [],
    "x",
)


def write_header(path: Path, rng: random.Random) -> str:
    number = rng.randrange(len(HEADERS))
    header = json.dumps(HEADERS[number]).encode()
    length = rng.choice((len(header), len(header), 2**63, 2**40, 0))
    tensors_of(path).write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    return f"header {number}, length {length}"


class Evil:
    """A pickle that would start a program."""

    def __reduce__(self):
        return os.system, ("true",)


def other_kind(path: Path, rng: random.Random) -> str:
    """A file of another kind: of training, of another adapter, or no tensors at all."""
    kind = rng.randrange(12)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    names = {
        0: ("emb_params",),
        1: ("clip_l", "clip_g"),
        2: ("model.diffusion_model.out.2.weight", "first_stage_model.x"),
        3: (f"{stem}.lokr_w1", f"{stem}.lokr_w2"),
        4: (f"{stem}.hada_w1_a", f"{stem}.hada_w1_b", f"{stem}.hada_w2_a"),
        5: (f"{stem}.oft_blocks",),
        6: (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.lora_mid.weight"),
        7: ("control_model.input_hint_block.0.weight",),
        8: ("step", "exp_avg", "exp_avg_sq"),
    }
    file = tensors_of(path)
    if kind in names:
        size = rng.choice((1, 2, 768, 1024))
        file.write_bytes(save({name: torch.ones(2, size) for name in names[kind]}))
    elif kind == 9:
        torch.save({"evil": Evil()}, file)
    elif kind == 10:
        file.write_bytes(b"GIF89a" + rng.randbytes(500))
    else:
        file.write_text("<html>" * rng.randrange(1, 100))
    return f"other kind {kind}"


KINDS: tuple[Damage, ...] = (
    damage_content,
    damage_content,
    damage_content,
    change_tensor,
    change_tensor,
    change_names,
    change_metadata,
    write_header,
    other_kind,
    replace_file,
    leave_alone,
)


# What must come of it


def check(
    family: Family, source: Path, original: Lora, damage: Damage, seed: str, folder: Path
) -> str:
    """Damage a copy of a file, read it, and write it in another format."""
    rng = random.Random(seed)
    path = folder / source.name
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copy(source, path)
    told = f"{source.name}: {damage(path, rng)}"
    if rng.random() < 0.2 and path.exists():
        path = path.rename(folder / rng.choice(("lora.pt", "lora.ckpt", "x", "é .bin")))
    try:
        lora = read_lora(path, family)
    except Exception as error:
        error.add_note(told)
        raise
    if lora.keys() != original.keys():
        return f"{told}: {len(lora)} layers of {len(original)}"
    tensors = [t for update in lora.values() for t in (update.a, update.b)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        return f"{told}: numbers that are not finite"
    difference = max_relative_difference(original, lora)
    if damage is leave_alone and difference > (1e-2 if "half" in source.name else TOLERANCE):
        return f"{told}: they differ by {difference}"
    form = rng.choice(list(FORMATS))
    out = folder / f"out{load_format(form).SUFFIX}"
    load_format(form).write(lora, family, out, {})
    difference = max_relative_difference(lora, read_lora(out, family))
    return "accepted" if difference < TOLERANCE else f"{told}: {form} differs by {difference}"


def cases(root: Path, count: int, seed: int) -> Iterator[Case]:
    """Each a function of seed and number, so that one case can be had again."""
    torch.set_num_threads(1)
    sources = []
    for name, make in MAKERS.items():
        base = root / name
        make().save_pretrained(base)
        family = FAMILIES[name](ModelConfig(family=name, pretrained_model_name_or_path=str(base)))
        lora = random_lora(family)
        (root / f"{name}-files").mkdir()
        files = make_files(root / f"{name}-files", family, lora)
        sources += [(family, file, lora) for file in files]
    for number in range(count):
        rng = random.Random(f"{seed} {number} source")
        damage = KINDS[number % len(KINDS)]
        check_one = partial(check, *rng.choice(sources), damage, f"{seed} {number}")
        yield Case(damage.__name__, check_one)


if __name__ == "__main__":
    sys.exit(fuzzing.main(__doc__, cases, SECONDS_PER_CASE, 400))
