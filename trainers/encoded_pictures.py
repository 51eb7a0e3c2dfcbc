"""From the photos of a DreamBooth run to its batches."""

from __future__ import annotations

import math

from accelerate import Accelerator

from trainers.class_pictures import prepare_class_pictures
from trainers.config import ConceptConfig, DataConfig, DreamBoothConfig
from trainers.config.validation_metrics import held_out_count
from trainers.data import photo_checks
from trainers.data.buckets import BucketRule, make_buckets, sizes_by_concept
from trainers.data.dreambooth_batches import DreamBoothBatches, held_out_batches
from trainers.data.encoder_cache import CachedEncoder, fill_cache
from trainers.data.rng import choose_rows, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.families import Family
from trainers.families.trainable import trained_encoders
from trainers.run_folder import CACHE

OTHERS_EVERY = 3  # of the rows that keep the base's outputs, the share that is not of the class


def prepare_batches(
    family: Family, config: DreamBoothConfig, accelerator: Accelerator
) -> tuple[DreamBoothBatches, list[DreamBoothBatches]]:
    """The batches to learn from, and those that are held out.

    The family's encoders are loaded one at a time, and none is afterwards. Raises: UserError for
    what is wrong with the pictures.
    """
    data, device = config.data, accelerator.device
    rule = BucketRule.from_config(config, family.max_side)
    intake, pools, held_out = photo_checks.load_photos(config, accelerator, rule)
    photo_checks.report(intake, family, [*pools[0], *held_out], config, accelerator)
    folder = data.cache_dir or config.output_dir / CACHE
    # now, so that what an earlier run has read of them is known to the keys of the cache
    family.digests(folder)
    trained = trained_encoders(family, config)
    encoder = CachedEncoder(family, folder, data.cache, trained, data.encode_batch_size)
    if data.class_sets:
        sizes = sizes_by_concept(pools[0], rule)
        pools.append(prepare_class_pictures(encoder, sizes, config, accelerator, intake))
    batch_slice = BatchSlice.from_config(config.seed, config.train, accelerator)
    class_sets = {name: photos.name for photos, names in data.class_sets for name in names}
    buckets = make_buckets(pools, rule, class_sets)
    kept = {photos.name: told_prompts(photos, data) for photos in data.sets}
    kept = kept if data.preserves_outputs else {}
    batches = DreamBoothBatches(pools, encoder, data, batch_slice, buckets, device, kept)
    limit = held_out_count(config, batch_slice.global_batch_size)
    measured = choose_rows(derive_seed(config.seed, "validation"), len(held_out), limit)
    held_out = [held_out[row] for row in measured]
    held_out_parts = held_out_batches(make_buckets([held_out], rule), encoder, config, device)
    if data.cache:
        fill_cache(encoder, [batches, *held_out_parts], config, accelerator)
    return batches, held_out_parts


def told_prompts(photos: ConceptConfig, data: DataConfig) -> list[str]:
    """What the rows that keep the base's outputs are told in turn: the class prompts of their set
    and, every `OTHERS_EVERY`-th time, another thing."""
    classes, others = photos.class_prompts, data.preserve_prompts
    if not others:
        return classes
    turns, before = [], OTHERS_EVERY - 1
    for i in range(math.lcm(len(classes), before * len(others))):
        turns.append(classes[i % len(classes)])
        if i % before == before - 1:
            turns.append(others[i // before % len(others)])
    return turns
