"""Hugging Face datasets, offline: folders of data files, and a dataset that fails as networks do."""

import json

import nmoe.data.hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nmoe.data.errors import NetworkError, SourceError
from nmoe.data.prep import prepare
from nmoe.data.remote import RETRIES, Patience
from nmoe.data.sources import open_source
from nmoe.data.tokenizers import ByteTokenizer

TEXTS = [f"row {number} " * (number % 40 + 1) for number in range(900)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    for number in range(3):
        part = TEXTS[300 * number : 300 * number + 300]
        table = pa.table({"id": list(range(300)), "text": part, "body": ["b"] * 300})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=70)
    return folder


def documents(source, start=None):
    return [text for cut in source.blocks(start) for text in cut.block.documents()]


def test_a_folder_is_streamed_and_read_on_from_every_cut(folder, monkeypatch):
    monkeypatch.setattr(nmoe.data.hub, "BLOCK_BYTES", 9000)
    source = open_source("hf", [folder])
    cuts = list(source.blocks())
    assert len(cuts) > 10
    assert documents(source) == TEXTS
    done = 0
    for cut in cuts:
        done += len(list(cut.block.documents()))
        assert documents(source, json.loads(json.dumps(cut.after))) == TEXTS[done:]
        assert cut.after["row"] == done
    described = source.describe()
    assert (described["kind"], described["name"], described["split"]) == ("hf", "my_dataset", "train")
    assert str(folder) not in json.dumps(described)


def test_columns_and_splits(folder):
    assert documents(open_source("hf", [folder], text_key="body")) == ["b"] * 900
    with pytest.raises(SourceError, match="'id', 'text', 'body'"):
        open_source("hf", [folder], text_key="content")
    with pytest.raises(SourceError, match="text under 'id'"):
        documents(open_source("hf", [folder], text_key="id"))
    with pytest.raises(SourceError, match="my_dataset"):
        open_source("hf", [folder], split="nowhere")


def test_identity_follows_the_files(folder):
    first = open_source("hf", [folder]).identity()
    assert open_source("hf", [folder]).identity() == first
    (folder / "train-2.parquet").unlink()
    assert open_source("hf", [folder]).identity() != first


def test_prepared_like_the_same_files(folder, tmp_path):
    hub = prepare(open_source("hf", [folder]), ByteTokenizer(), tmp_path / "hub")
    files = prepare(open_source("parquet", [folder]), ByteTokenizer(), tmp_path / "files")
    assert (hub.train.fingerprint, hub.val.fingerprint) == (files.train.fingerprint, files.val.fingerprint)


class Flaky:
    """A dataset whose stream breaks off after each of the given numbers of rows."""

    def __init__(self, dataset, breaks, error):
        self.dataset, self.breaks, self.error = dataset, breaks, error

    def select_columns(self, names):
        return FlakyView(self.dataset.select_columns(names), self)


class FlakyView:
    def __init__(self, view, flaky):
        self.view, self.flaky = view, flaky
        self.state_dict, self.load_state_dict = view.state_dict, view.load_state_dict

    def __iter__(self):
        rows = self.flaky.breaks.pop(0) if self.flaky.breaks else None
        for number, example in enumerate(self.view):
            if number == rows:
                raise self.flaky.error
            yield example


def test_network_trouble_is_told_and_reading_goes_on(folder, monkeypatch):
    monkeypatch.setattr(nmoe.data.hub, "BLOCK_BYTES", 3000)
    notices, pauses = [], []
    source = open_source("hf", [folder], patience=Patience(notices.append, pauses.append))
    source._dataset = Flaky(source._dataset, [0, 200, 5, 5, 300], ConnectionError("Server Disconnected"))
    assert documents(source) == TEXTS
    assert len(notices) == 5
    assert all("Server Disconnected" in notice for notice in notices)


def test_network_trouble_without_end_stops_with_a_remedy(folder):
    pauses = []
    source = open_source("hf", [folder], patience=Patience(sleep=pauses.append))
    source._dataset = Flaky(source._dataset, [0] * 50, TimeoutError("too slow"))
    with pytest.raises(NetworkError, match=r"too slow.*Run the same command again"):
        documents(source)
    assert len(pauses) == RETRIES


def test_other_errors_are_no_network_trouble(folder):
    source = open_source("hf", [folder])
    source._dataset = Flaky(source._dataset, [3], ValueError("cannot be cast"))
    with pytest.raises(SourceError, match="cannot be cast"):
        documents(source)


def test_a_dataset_that_cannot_be_asked_for_is_told(monkeypatch):
    import huggingface_hub

    notices = []

    def fail(self, name, revision=None):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(NetworkError, match=r"someone/data.*no route"):
        open_source("hf", ["someone/data"], patience=Patience(notices.append, lambda seconds: None))
    assert len(notices) == RETRIES
