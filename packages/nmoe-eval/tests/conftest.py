"""What the tests share: one thread, a tokenizer that joins spaces to words, small models."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

SHARED = Path(__file__).resolve().parents[3].parent / "shared"


def pytest_runtest_setup(item):
    """Tests marked `gpu` need no `skipif` of their own."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, found none")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Words:
    """Pieces of text, a word with the space before it, are ids by their hash: borders of tokens depend on what follows,
    as those of byte-pair encoding do."""

    name, fingerprint = "words", "0" * 64

    def __init__(self, n_vocab):
        self.n_vocab, self.eos_id = n_vocab, n_vocab - 1

    def encode(self, text):
        return [zlib.crc32(piece.encode()) % self.eos_id for piece in re.findall(r" ?\w+|\s|[^\w\s]", text)]

    def decode(self, ids):
        return "".join(f" <{number}>" for number in ids)


@pytest.fixture(scope="session")
def words():
    return Words


@pytest.fixture(scope="session")
def small_model():
    """`small_model(n_vocab, dtype)`: MLA and experts, sharp enough that scores differ."""

    def make(n_vocab, dtype=torch.float64, seed=1, **changes):
        shape = {
            "vocab_size": n_vocab, "dim": 16, "n_layers": 2, "n_heads": 2, "init_std": 0.3, "inter_dim": 24,
            "moe_inter_dim": 8, "n_routed_experts": 8, "n_activated_experts": 2, "attn": "mla", "kv_lora_rank": 6,
            "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
        }  # fmt: skip
        ops = select_ops("reference", "cpu")
        config = ModelConfig(**(shape | changes))
        return Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=dtype, seed=seed).eval()

    return make


@pytest.fixture(scope="module")
def model():
    """Plain attention and experts, in fp64; ids up to 20."""
    config = ModelConfig(
        vocab_size=21, dim=16, n_layers=2, n_heads=2, init_std=0.3, attn="sdpa", head_dim=8,
        inter_dim=24, moe_inter_dim=8, n_routed_experts=4, n_activated_experts=2,
    )  # fmt: skip
    ops = select_ops("reference", "cpu")
    return Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=torch.float64, seed=1).eval()


@pytest.fixture
def write_jsonl():
    """`write_jsonl(path, rows)`: a line a row; text is written as it is."""

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def shared_bundle():
    """The folder of a real evaluation bundle, where it is present."""
    folder = SHARED / "data" / "eval_bundle"
    if not folder.is_dir():
        pytest.skip("needs shared/data/eval_bundle beside the repository")
    return folder
