import json
import os
import time

import numpy as np
import pytest
from nmoe.data.errors import CorruptShardError, ManifestError, MissingShardSetError, TokenPositionError
from nmoe.data.manifest import Manifest, read_manifest, write_manifest
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import ByteTokenizer

TEXTS = ["one", "", "a longer document that fills a shard of its own, and more than that", "żółw", "x" * 20, "y" * 49]


def expected_tokens(texts):
    return np.concatenate([[*text.encode(), 256] for text in texts])


def test_stream_and_documents_across_shards(byte_set):
    shards = byte_set(TEXTS)
    everything = expected_tokens(TEXTS)
    assert len(shards.manifest.shards) == 4
    assert (shards.n_tokens, shards.n_documents) == (everything.size, len(TEXTS))
    assert shards.n_bytes == sum(len(text.encode()) for text in TEXTS)
    for start in range(shards.n_tokens + 1):
        for count in range(0, shards.n_tokens - start + 1, 7):
            part = shards.tokens(start, count)
            assert part.dtype == np.uint32
            assert np.array_equal(part, everything[start : start + count])
    for number, text in enumerate(TEXTS):
        assert shards.document(number).tolist() == [*text.encode(), 256]


def test_shards_hold_whole_documents_and_only_a_long_one_overflows(byte_set):
    shards = byte_set(TEXTS)
    assert [shard.n_documents for shard in shards.manifest.shards] == [2, 1, 2, 1]
    assert [shard.n_tokens <= 50 for shard in shards.manifest.shards] == [True, False, True, True]


@pytest.mark.parametrize(("shard_tokens", "documents"), [(19, [1] * 6), (20, [2] * 3), (29, [2] * 3), (30, [3] * 2)])
def test_a_shard_is_filled_to_its_last_token(byte_set, shard_tokens, documents):
    shards = byte_set(["nine char"] * 6, shard_tokens=shard_tokens)
    assert [shard.n_documents for shard in shards.manifest.shards] == documents


def test_files_are_plain_numpy_arrays(byte_set):
    shards = byte_set(TEXTS)
    assert sorted(os.listdir(shards.path))[:3] == ["manifest.json", "shard_00000.idx", "shard_00000.npy"]
    tokens = [np.load(shards.path / shard.tokens.name) for shard in shards.manifest.shards]
    assert {array.dtype for array in tokens} == {np.dtype(np.uint32)}
    assert np.array_equal(np.concatenate(tokens), expected_tokens(TEXTS))
    with open(shards.path / "shard_00000.idx", "rb") as handle:
        index = np.lib.format.read_array(handle)
    assert index.dtype == np.int64
    assert index.tolist() == [0, 4]


@pytest.mark.parametrize(
    "call", [lambda s: s.tokens(-1, 1), lambda s: s.tokens(s.n_tokens, 1), lambda s: s.tokens(0, -1)]
)
def test_positions_outside_are_refused(byte_set, call):
    with pytest.raises(TokenPositionError):
        call(byte_set(TEXTS))


@pytest.mark.parametrize("number", [-1, len(TEXTS)])
def test_documents_outside_are_refused(byte_set, number):
    with pytest.raises(TokenPositionError, match=f"document {number}"):
        byte_set(TEXTS).document(number)


FILES = ["shard_00000.npy", "shard_00000.idx", "shard_00002.npy", "shard_00003.idx"]


@pytest.mark.parametrize("verify", ["size", "checksums"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "truncated", "longer", "empty", "folder"])
def test_damaged_files_are_refused_by_name(byte_set, name, fault, verify):
    path = byte_set(TEXTS).path
    data = (path / name).read_bytes()
    (path / name).unlink()
    if fault == "folder":
        (path / name).mkdir()
    elif fault != "missing":
        (path / name).write_bytes({"truncated": data[:-1], "longer": data + b"\0", "empty": b""}[fault])
    with pytest.raises(CorruptShardError, match=name):
        ShardSet.open(path, verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_refused_by_name(byte_set, name):
    path = byte_set(TEXTS).path
    data = (path / name).read_bytes()
    for position in range(0, len(data), 11):
        spoiled = bytearray(data)
        spoiled[position] ^= 1 << position % 8
        (path / name).write_bytes(spoiled)
        with pytest.raises(CorruptShardError, match=name):
            ShardSet.open(path, verify="checksums")
    (path / name).write_bytes(data)
    ShardSet.open(path, verify="checksums")


@pytest.mark.parametrize("dtype", ["<i4", ">u4", "<f4"])
def test_foreign_types_are_refused_by_name(byte_set, dtype):
    """Same size, so that only the header tells."""
    path = byte_set(TEXTS).path
    tokens = np.load(path / "shard_00001.npy")
    np.save(path / "shard_00001.npy", tokens.astype(dtype))
    with pytest.raises(CorruptShardError, match=r"shard_00001\.npy.*uint32"):
        ShardSet.open(path)


def test_pickled_content_is_refused(byte_set):
    path = byte_set(TEXTS).path
    size = (path / "shard_00001.npy").stat().st_size
    np.save(path / "shard_00001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with open(path / "shard_00001.npy", "ab") as handle:
        handle.truncate(size)
    with pytest.raises(CorruptShardError, match=r"shard_00001\.npy"):
        ShardSet.open(path)


def rewrite_index(path, starts):
    """An index with other starts, and a manifest to match: only its meaning is wrong."""
    with open(path / "shard_00000.idx", "wb") as handle:
        np.lib.format.write_array(handle, np.array(starts, np.int64))
    import hashlib

    digest = hashlib.sha256((path / "shard_00000.idx").read_bytes()).hexdigest()
    content = read_manifest(path).model_dump()
    content["shards"][0]["index"]["sha256"] = digest
    write_manifest(path, Manifest.model_validate(content))


@pytest.mark.parametrize("starts", [[1, 4], [0, 3], [0, 5], [0, 0], [0, 400]])
def test_an_index_that_splits_documents_wrongly_is_refused(byte_set, starts):
    path = byte_set(TEXTS).path
    rewrite_index(path, [0, 4])
    ShardSet.open(path, verify="checksums")
    rewrite_index(path, starts)
    with pytest.raises(CorruptShardError, match=r"shard_00000\.idx"):
        ShardSet.open(path, verify="checksums")


def test_no_manifest_means_no_set(byte_set, tmp_path):
    path = byte_set(TEXTS).path
    with pytest.raises(MissingShardSetError, match="train"):
        ShardSet.open(path.parent)
    (path / "manifest.json").unlink()
    with pytest.raises(MissingShardSetError, match="cut short"):
        ShardSet.open(path)
    with pytest.raises(MissingShardSetError, match="no such folder"):
        ShardSet.open(tmp_path / "nowhere")


def test_any_flipped_byte_of_the_manifest_is_refused(byte_set):
    path = byte_set(TEXTS[:2]).path
    data = (path / "manifest.json").read_bytes()
    for position in range(len(data) - 1):
        spoiled = bytearray(data)
        spoiled[position] ^= 1 << position % 7
        (path / "manifest.json").write_bytes(spoiled)
        with pytest.raises(ManifestError, match=r"manifest\.json"):
            read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"n_tokens": 1},
        {"n_documents": 7},
        {"n_bytes": -1},
        {"dtype": "uint16"},
        {"shards": []},
        {"extra": 1},
    ],
)
def test_manifests_that_make_no_sense_are_refused(byte_set, change):
    """Even with a checksum to match."""
    from nmoe.data.manifest import _digest

    path = byte_set(TEXTS[:2]).path
    content = json.loads((path / "manifest.json").read_text()) | change
    del content["checksum"]
    (path / "manifest.json").write_text(json.dumps(content | {"checksum": _digest(content)}))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        ShardSet.open(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"checksum": 1}'])
def test_what_is_no_manifest_is_refused(byte_set, text):
    path = byte_set(TEXTS[:2]).path
    (path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        ShardSet.open(path)


def test_a_manifest_cannot_lead_out_of_its_folder(byte_set):
    content = byte_set(TEXTS[:2]).manifest.model_dump()
    content["shards"][0]["tokens"]["name"] = "../shard_00000.npy"
    with pytest.raises(ValueError, match="pattern"):
        Manifest.model_validate(content)


def test_fingerprint_follows_the_tokens_alone(byte_set, tmp_path):
    from nmoe.data.prep import prepare_documents

    first = byte_set(TEXTS, name="first")
    second = prepare_documents(
        {"train": TEXTS}, ByteTokenizer(), tmp_path / "second", source={"kind": "other"}, shard_tokens=50
    ).train
    assert first.fingerprint == second.fingerprint
    others = [TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-1], "y" * 48 + "z"], [*TEXTS, ""]]
    prints = [byte_set(texts, name=f"other{i}").fingerprint for i, texts in enumerate(others)]
    assert len({first.fingerprint, *prints}) == 5

    same_ids = ByteTokenizer()
    object.__setattr__(same_ids.vocabulary, "pattern", "another tokenizer")
    third = prepare_documents({"train": TEXTS}, same_ids, tmp_path / "third", source={}, shard_tokens=50).train
    assert np.array_equal(third.tokens(0, third.n_tokens), first.tokens(0, first.n_tokens))
    assert third.fingerprint != first.fingerprint


def test_mappings_hold_no_file_descriptors(token_set):
    """A large set has more shards than a process may have open files."""
    n_shards = 300
    shards = token_set(np.arange(10 * n_shards), borders=range(10, 10 * n_shards, 10))
    before = len(os.listdir("/dev/fd"))
    assert [int(shards.tokens(10 * number, 1)[0]) for number in range(n_shards)] == [*range(0, 10 * n_shards, 10)]
    assert all(shards.document(number).size == 10 for number in range(n_shards))
    assert len(os.listdir("/dev/fd")) == before


def test_a_shard_that_goes_after_opening_is_named(token_set):
    shards = token_set(np.arange(40), borders=(10, 20))
    (shards.path / "shard_00001.npy").unlink()
    assert shards.tokens(0, 10).size == 10
    with pytest.raises(CorruptShardError, match=r"shard_00001\.npy"):
        shards.tokens(8, 10)


def test_an_id_beyond_the_vocabulary_is_refused_by_name(token_set):
    path = token_set([1, 2, 9, 3, 4, 9], borders=(3,), n_vocab=10, eos_id=9).path
    ShardSet.open(path, verify="checksums")
    other = token_set([1, 2, 9, 3, 40, 9], borders=(3,), n_vocab=10, eos_id=9, name="other").path
    with pytest.raises(CorruptShardError, match=r"shard_00001\.npy: expected ids under 10, found 40"):
        ShardSet.open(other, verify="checksums")


def test_ten_thousand_shards_open_within_a_second(tmp_path):
    from nmoe.data.bench.loader import write_set

    write_set(tmp_path / "many", n_shards=10_000, shard_tokens=64)
    took = []
    for _ in range(3):
        begun = time.process_time()  # this process's own: others run beside it
        shards = ShardSet.open(tmp_path / "many")
        assert shards.tokens(shards.n_tokens - 8, 8).size == 8
        took.append(time.process_time() - begun)
    assert min(took) < 1
