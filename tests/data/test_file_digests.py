"""Which files a base model is: read once, known again, and told apart."""

import os

import pytest

from trainers.data import file_digests
from trainers.data.file_digests import FileDigests, part_digest


@pytest.fixture
def reads(monkeypatch):
    """The names of all files whose contents were read for a digest."""
    names, plain = [], file_digests.read_digest

    def read(path):
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(file_digests, "read_digest", read)
    return names


def fresh(store):
    digests = FileDigests()
    digests.load(store)
    return digests


def test_a_file_is_read_once_touched_ones_again_and_a_change_is_seen_whatever_its_times(
    tmp_path, reads
):
    file, store = tmp_path / "unet.safetensors", tmp_path / "cache" / "base_files.json"
    file.write_bytes(b"weights")
    digests = fresh(store)
    first = digests(file)
    digests.save()
    assert fresh(store)(file) == first
    assert len(reads) == 1
    os.utime(file)
    digests = fresh(store)
    assert digests(file) == first
    digests.save()
    assert len(reads) == 2
    stamp = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_mtime_ns == stamp.st_mtime_ns
    assert fresh(store)(file) != first


@pytest.mark.parametrize("content", [b"null", b"[", b'{"a": 3}', b"\xff"])
def test_a_damaged_store_of_digests_is_no_store(tmp_path, content):
    (tmp_path / "store.json").write_bytes(content)
    assert fresh(tmp_path / "store.json").known == {}


def test_a_digest_that_was_changed_in_the_store_is_not_believed(tmp_path, reads):
    file, store = tmp_path / "unet.safetensors", tmp_path / "store.json"
    file.write_bytes(b"weights")
    digests = fresh(store)
    digest = digests(file)
    digests.save()
    content = store.read_text("utf-8")
    other = digest.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    for place in (store, tmp_path / "pipe"):
        if place == store:
            store.write_text(content.replace(digest, other), "utf-8")
        else:
            os.mkfifo(place)
        assert fresh(place)(file) == digest
    assert len(reads) == 3


def test_the_hubs_cache_names_its_files_by_their_digest(tmp_path, reads):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "unet"
    blobs.mkdir()
    folder.mkdir(parents=True)
    (blobs / ("a" * 64)).write_bytes(b"weights")
    (folder / "model.safetensors").symlink_to(blobs / ("a" * 64))
    assert FileDigests()(folder / "model.safetensors") == "a" * 64
    assert reads == []
    # elsewhere such a name says nothing
    (tmp_path / ("b" * 64)).write_bytes(b"weights")
    (folder / "vae.safetensors").symlink_to(tmp_path / ("b" * 64))
    assert FileDigests()(tmp_path / ("b" * 64)) != "b" * 64
    assert FileDigests()(folder / "vae.safetensors") != "b" * 64


def test_other_formats_and_precisions_beside_the_loaded_weights_do_not_count(tmp_path):
    def digest(variant=None):
        return part_digest(tmp_path, variant, FileDigests())

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    first = digest()
    for name in ("model.fp16.safetensors", "model.bin", ".DS_Store", "README.md", "model.onnx"):
        (tmp_path / name).write_text(name)
    assert digest() == first
    # weights in parts, of a variant that is there
    half = digest("fp16")
    assert half != first
    (tmp_path / "model.fp16-00001-of-00002.safetensors").write_text("half")
    assert digest("fp16") != half
    assert digest() == digest("bf16") == first
    (tmp_path / "config.json").write_text("{}")
    assert digest() != first
