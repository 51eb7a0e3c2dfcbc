"""Unchanged entries are not read at the start, damaged ones are never used, and memory is
bounded."""

import os
import random
from collections import OrderedDict

import pytest
import torch
from accelerate import Accelerator

from tests.shared.pictures import let_time_pass
from trainers.data import known_values, tensor_cache
from trainers.data.crops import Crop
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.tensor_cache import RecentTensors, TensorCache
from trainers.errors import RunFailedError
from trainers.families.sd15 import SD15

KEYS = [f"{i:02d}key" for i in range(4)]


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """What was written just now counts as old."""
    monkeypatch.setattr(known_values, "SETTLED_SECONDS", 0)


@pytest.fixture
def reads(monkeypatch):
    """The keys of the entries that were read."""
    keys, plain = [], TensorCache.read_file

    def read_file(self, key):
        keys.append(key)
        return plain(self, key)

    monkeypatch.setattr(TensorCache, "read_file", read_file)
    return keys


@pytest.fixture
def start(tmp_path):
    """A function that returns the cache as a new run finds it."""

    def load():
        cache = TensorCache(tmp_path / "cache")
        cache.load_states()
        return cache

    return load


@pytest.fixture
def written(start):
    cache = start()
    for i, key in enumerate(KEYS):
        cache.write(key, {"moments": torch.full((9,), float(i))})
    cache.save_states()
    return cache


def intact(cache):
    found = [key for key in KEYS if cache.is_intact(key)]
    cache.save_states()
    return found


@pytest.mark.usefixtures("written")
def test_entries_that_have_not_changed_are_not_read_and_changed_ones_are(start, reads):
    assert intact(start()) == KEYS
    assert reads == []
    path = start().path(KEYS[1])
    let_time_pass(path)
    os.utime(path)
    assert intact(start()) == KEYS
    assert reads == KEYS[1:2]
    assert intact(start()) == KEYS
    assert reads == KEYS[1:2]


@pytest.mark.usefixtures("written")
def test_damage_that_keeps_size_and_time_is_found_at_the_start(start):
    path = start().path(KEYS[2])
    stamp, content = path.stat(), path.read_bytes()
    let_time_pass(path)
    path.write_bytes(content[:-1] + b"?")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    assert intact(start()) == [key for key in KEYS if key != KEYS[2]]


@pytest.mark.usefixtures("written")
def test_files_that_are_exchanged_or_gone_are_found_at_the_start(start):
    paths = [start().path(key) for key in KEYS]
    paths[0].rename(paths[0].with_suffix(".aside"))
    paths[1].rename(paths[0])
    paths[0].with_suffix(".aside").rename(paths[1])
    paths[3].unlink()
    assert intact(start()) == KEYS[2:3]


@pytest.mark.usefixtures("written")
def test_what_is_noted_of_another_file_or_damaged_is_not_believed(start, reads, tmp_path):
    store = tmp_path / "cache/entries.json"
    whole, rng = store.read_bytes(), random.Random(0)
    for offset in rng.sample(range(len(whole)), 40):
        changed = bytearray(whole)
        changed[offset] ^= 1 << rng.randrange(7)
        store.write_bytes(changed)
        path = start().path(KEYS[0])
        content = path.read_bytes()
        let_time_pass(path)
        path.write_bytes(content[:-1] + b"?")
        assert not start().is_intact(KEYS[0]), offset
        path.write_bytes(content)


def test_bits_that_rot_unseen_are_never_used_and_are_encoded_again(settings, photos, tmp_path):
    """Size and times of the file tell nothing; the checksum does when it is read for training."""

    def fill():
        encoder = CachedEncoder(SD15(settings().model), tmp_path / "cache", True, ())
        encoder.fill([view], [], Accelerator(cpu=True))
        return encoder

    view = load_instance_pictures(settings().data)[0], Crop.square(16)
    encoder = fill()
    good = encoder.moments(*view)
    path = encoder.cache.path(encoder.image_key(*view))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    rotten = TensorCache(tmp_path / "cache")
    rotten.load_states()
    rotten.states.known[path.stem] = known_values.settled_state(path)
    rotten.save_states()
    with pytest.raises(RunFailedError, match="lost or damaged during the run"):
        fill().moments(*view)
    assert torch.equal(fill().moments(*view), good)


def test_entries_in_memory_are_the_ones_used_last_within_their_bytes():
    """Beside a plain model: every entry in the order of its use, the oldest taken off."""
    rng, recent, model = random.Random(0), RecentTensors(1000), OrderedDict()
    for _ in range(2000):
        key = rng.choice("abcdefghij")
        if rng.random() < 0.5:
            found = recent.get(key)
            assert (found is None) == (key not in model)
            if found is not None:
                assert found["x"].nbytes == model[key]
                model.move_to_end(key)
        elif rng.random() < 0.1:
            recent.drop(key)
            model.pop(key, None)
        else:
            size = rng.choice((4, 100, 400, 1200))
            recent.put(key, {"x": torch.zeros(size // 4)})
            model.pop(key, None)
            model[key] = size
            while sum(model.values()) > 1000:
                model.popitem(last=False)
        assert recent.num_bytes == sum(model.values()) <= 1000
        assert list(recent.entries) == list(model)


def test_an_entry_is_read_again_once_it_is_out_of_memory(written, reads, monkeypatch):
    written.recent = RecentTensors(2 * 36)
    for key in (*KEYS, KEYS[3], KEYS[2], KEYS[0]):
        assert written.read(key)["moments"].unique().tolist() == [float(KEYS.index(key))]
    assert reads == [*KEYS, KEYS[0]]


def test_what_is_in_memory_does_not_hang_on_the_file(written):
    """A file that is cut short under a map ends the process."""
    moments = written.read(KEYS[1])["moments"]
    os.truncate(written.path(KEYS[1]), 0)
    assert moments.tolist() == [1.0] * 9


def test_processes_of_one_machine_share_what_entries_may_take(monkeypatch):
    monkeypatch.setattr(tensor_cache, "MAX_BYTES", 2**60)
    alone = tensor_cache.memory_limit()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert tensor_cache.memory_limit() == alone // 4
