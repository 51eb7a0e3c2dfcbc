"""The LoRA at step 0: drawn at random, or taken from a file that the toolkit reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft.tuners import lora
from torch import Tensor

from trainers.config import LoraConfig
from trainers.data.file_digests import read_digest
from trainers.errors import UserError, name_some
from trainers.families import Family
from trainers.lora import peft_format
from trainers.lora.base_layers import name_prefix
from trainers.lora.files import read_lora
from trainers.lora.layers import add_lora
from trainers.lora.low_rank import reduce_rank
from trainers.lora.update import Lora, LoraUpdate, is_dora, is_lycoris
from trainers.run_folder import WEIGHT_NAME
from trainers.training.process_state import is_first_process
from trainers.training.run_weights import find_run_weights, is_run

ADAPTER = "default"


def start_lora(
    family: Family, config: LoraConfig | None, text_encoders: Sequence[str]
) -> str | None:
    """Put LoRA, if it is asked for, into the denoiser and these encoders as it is at step 0.

    Returns the digest of the file that it starts from, if any. Raises: UserError.
    """
    if config is None:
        return None
    add_lora(family, config, text_encoders)
    if config.init_from is None:
        return None
    path = find_initial_lora(config.init_from)
    layers = dict(adapted_layers(family, text_encoders))
    updates = fit_updates(read_lora(path, family), layers, config, path)
    for name, update in updates.items():
        set_update(layers[name], update)
    fresh = [name for name in layers if name not in updates]
    if fresh and is_first_process():
        print(f"{path} has nothing for {name_some(fresh)}: they start anew")
    return digest_of(path)


def find_initial_lora(source: str) -> Path:
    """The file or PEFT folder that `lora.init_from` names. Raises: UserError."""
    if is_run(source):
        found = find_run_weights(source, "dreambooth")
        if not found.config.writes_lora:
            raise UserError(f"lora.init_from: {source} trained all weights, so it has no LoRA")
        if found.note and is_first_process():
            print(f"lora.init_from: {found.note}")
        return found.folder / WEIGHT_NAME
    path = Path(source)
    if (path / WEIGHT_NAME).is_file():
        return path / WEIGHT_NAME
    return path if path.exists() else download_lora(source)


def download_lora(repo: str) -> Path:
    """The LoRA file of a repository on the Hub. Raises: UserError."""
    try:
        return Path(hf_hub_download(repo, WEIGHT_NAME))
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        reason = " ".join(str(error).split())
        raise UserError(
            f"lora.init_from: there is no file or folder {repo}, and {WEIGHT_NAME} cannot be "
            f"downloaded from a repository of that name on the Hub ({reason}). Check the name; if "
            "its LoRA has another name there, download it and name the file; when offline, run "
            f"`hf download {repo} {WEIGHT_NAME}` before where there is a network"
        ) from error


def adapted_layers(
    family: Family, text_encoders: Sequence[str]
) -> Iterator[tuple[str, lora.LoraLayer]]:
    """The layers with LoRA, by the names that a `Lora` has for them."""
    for component in (family.denoiser_name, *text_encoders):
        module = getattr(family.pipe, component)
        prefix = name_prefix(component, module)
        for name, layer in module.named_modules():
            if isinstance(layer, lora.LoraLayer):
                yield prefix + name, layer


def fit_updates(
    updates: Lora, layers: dict[str, lora.LoraLayer], config: LoraConfig, path: Path
) -> Lora:
    """The updates, each at a rank of at most that of its layer. Raises: UserError."""
    if is_lycoris(updates):
        raise UserError(
            f"lora.init_from: {path} is LoKr or LoHa, from which no run can start. The nearest "
            "LoRA of a rank is written by scripts/export.py FILE --base MODEL --rank N"
        )
    others = [name for name in updates if name not in layers]
    if others:
        untrained = sorted({name.partition(".")[0] for name in others})
        raise UserError(
            f"lora.init_from: {path} has updates of layers that this run does not train, in "
            f"{', '.join(untrained)}: {name_some(others)}. Add them by lora.target_modules "
            "(all-linear has every linear layer), lora.blocks or train.train_text_encoder"
        )
    if is_dora(updates) and not config.use_dora:
        raise UserError(f"lora.init_from: {path} is DoRA: set lora.use_dora: true")
    ranks = {name: layers[name].r[ADAPTER] for name in updates}
    if all(update.rank <= ranks[name] for name, update in updates.items()):
        return updates
    rank = max(update.rank for update in updates.values())
    if is_dora(updates):
        raise UserError(
            f"lora.init_from: {path} is DoRA of rank {rank}, whose nearest of a lower rank is not "
            f"known: set lora.rank: {rank} or more"
        )
    reduced, lost = reduce_rank(updates, ranks)
    if is_first_process():
        own = " and lora.rank_pattern" if config.rank_pattern else ""
        print(
            f"lora.init_from: of rank {rank}, lora.rank={config.rank}{own} keeps all but "
            f"{lost:.2%} of the updates (Frobenius norm)"
        )
    return reduced


@torch.no_grad()
def set_update(layer: lora.LoraLayer, update: LoraUpdate) -> None:
    """Let a layer compute the update; what the rank has beyond it starts as it was drawn, with
    zeros in B."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    rank, scale = update.rank, layer.scaling[ADAPTER]
    a[:rank] = update.a.reshape(rank, *a.shape[1:]).to(a.device)
    b.zero_()
    b[:, :rank] = (update.b / scale).reshape(len(b), rank, *b.shape[2:]).to(b.device)
    if ADAPTER in layer.lora_magnitude_vector:
        set_magnitude(layer.lora_magnitude_vector[ADAPTER], layer, update.magnitude)


def set_magnitude(
    magnitude: lora.dora.DoraLinearLayer, layer: lora.LoraLayer, values: Tensor | None
) -> None:
    """DoRA's magnitude as the file has it, or that which leaves the rows of W + B A as they are."""
    own = magnitude.weight
    if values is None:
        factors = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        magnitude.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=factors[0],
            lora_B=factors[1],
            scaling=layer.scaling[ADAPTER],
        )
        values = magnitude.weight
        magnitude.weight = own
    own.copy_(values.reshape(own.shape))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of those of the files in a PEFT folder."""
    if path.is_file():
        return read_digest(path)
    endings = (peft_format.CONFIG_NAME, peft_format.TENSORS_NAME)
    files = sorted(file for file in path.rglob("*") if file.name in endings)
    return hashlib.sha256("".join(map(read_digest, files)).encode()).hexdigest()
