"""Hugging Face's DeepSeek-V3 format: files, names and dtypes, and all that is refused. What the tensors mean is checked
against transformers in test_hf.py."""

import errno
import json
import shutil
from math import prod

import pytest
import torch
from nmoe.model import hf
from nmoe.model.errors import (
    DiskSpaceError,
    FolderExistsError,
    ForeignModelError,
    TensorMismatchError,
    UnsupportedByFormatError,
)
from nmoe.model.hf import export_hf, import_hf
from nmoe.model.hf_config import model_config
from nmoe.model.hf_weights import is_mtp, state_shapes
from nmoe.model.schema import ModelConfig, YarnConfig
from safetensors.torch import load_file, save_file

SHAPE = {
    **{"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 2, "inter_dim": 24, "rope_theta": 500.0},
    **{"q_lora_rank": 8, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6},
    **{"n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_inter_dim": 10},
    **{"n_expert_groups": 4, "n_limited_groups": 2, "route_scale": 2.5, "mtp_depth": 2},
    "yarn": YarnConfig(factor=4.0, original_seq_len=16, mscale_all_dim=0.5),
}
TRAINING = {"router_bias_update_rate": 0.01, "seq_balance_loss": 0.5, "aux_loss": 0.25, "mtp_loss_weight": 0.125}
CONFIG = ModelConfig(**SHAPE, **TRAINING)


def random_state(config):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in state_shapes(config).items()}


STATE = random_state(CONFIG)


def export(config, state, output, **options):
    options = {"dtype": torch.float32, "eos_id": 7, "max_position_embeddings": 64, "extra_files": {}} | options
    export_hf(config, state, output, **options)
    return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(CONFIG, STATE, tmp_path_factory.mktemp("hf") / "out")


def test_import_gives_the_same_back(exported):
    config, tensors = import_hf(exported)
    assert config == CONFIG
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())


def test_sharded_export(tmp_path):
    limit = 20_000
    folder = export(CONFIG, STATE, tmp_path / "out", max_file_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    held = {}
    for file in files:
        content = load_file(folder / file)
        size = sum(tensor.nbytes for tensor in content.values())
        assert size <= limit or len(content) == 1
        held |= dict.fromkeys(content, (file, content))
    assert index["weight_map"] == {name: file for name, (file, _) in held.items()}
    assert index["metadata"]["total_size"] == sum(content[name].nbytes for name, (_, content) in held.items())

    config, tensors = import_hf(folder)
    assert config == CONFIG
    assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.items())


def test_extra_files_are_written_as_they_are(tmp_path):
    tokenizer = {"model": {"vocab": {"é": 1}}}
    folder = export(CONFIG, STATE, tmp_path / "out", extra_files={"tokenizer.json": tokenizer})
    assert json.loads((folder / "tokenizer.json").read_bytes()) == tokenizer
    assert json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == 7


MLA_WIDTHS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
INEXPRESSIBLE = {
    "attn": {"attn": "sdpa", "head_dim": 8, **dict.fromkeys(MLA_WIDTHS)},
    "attn_local": {"attn_local": "swa", "attn_global_every": 2, "attn_local_window": 4},
    "mtp_depth": {"n_dense_layers": 3, "mtp_depth": 1},
    "n_routed_experts": {
        **{"n_routed_experts": 1, "n_activated_experts": 1},
        **{"n_expert_groups": 1, "n_limited_groups": 1},
    },
}


@pytest.mark.parametrize("key", INEXPRESSIBLE)
def test_export_refuses_what_the_format_cannot_express(key, tmp_path):
    config = ModelConfig(**{**SHAPE, **INEXPRESSIBLE[key]})
    with pytest.raises(UnsupportedByFormatError, match=rf"found {key} =") as refusal:
        export(config, random_state(config), tmp_path / "out")
    assert refusal.value.keys == (key,)
    assert not list(tmp_path.iterdir())


def test_export_names_all_that_the_format_cannot_express(tmp_path):
    config = ModelConfig(**{**SHAPE, **INEXPRESSIBLE["attn"], **INEXPRESSIBLE["attn_local"]})
    with pytest.raises(UnsupportedByFormatError) as refusal:
        export(config, random_state(config), tmp_path / "out")
    assert refusal.value.keys == ("attn", "attn_local")


def test_export_refuses_other_dtypes(tmp_path):
    with pytest.raises(UnsupportedByFormatError, match=r"float16"):
        export(CONFIG, STATE, tmp_path / "out", dtype=torch.float16)


def test_export_refuses_tensors_of_another_config(tmp_path):
    state = dict(STATE)
    state["norm.weight"] = state["norm.weight"][1:]
    del state["head.weight"]
    state["layers.9.attn_norm.weight"] = torch.ones(3)
    with pytest.raises(TensorMismatchError) as refusal:
        export(CONFIG, state, tmp_path / "out")
    assert [problem.split(",")[0].split(" of ")[0] for problem in refusal.value.problems] == [
        "no head.weight",
        "layers.9.attn_norm.weight",
        "norm.weight",
    ]


def test_export_refuses_an_existing_output(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FolderExistsError):
        export(CONFIG, STATE, tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_export_leaves_nothing(code, tmp_path, monkeypatch):
    def fail(path, *rest):
        path.write_bytes(b"part")
        raise OSError(code, "the disk")

    monkeypatch.setattr(hf, "write_tensors", fail)
    with pytest.raises(DiskSpaceError if code == errno.ENOSPC else OSError):
        export(CONFIG, STATE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_asks_for_space_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError):
        export(CONFIG, STATE, tmp_path / "out")
    assert not list(tmp_path.iterdir())


DROP = object()
FOREIGN_CONFIGS = {
    "model_type": "deepseek_v2",
    "hidden_act": "gelu",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "rope_interleave": False,
    "tie_word_embeddings": True,
    "num_key_value_heads": 1,
    "moe_layer_freq": 2,
    "quantization_config": {"quant_method": "fp8"},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_theta": DROP,
    "kv_lora_rank": DROP,
    "hidden_size": "32",
    "n_group": 5,
    "nmoe": {"unknown": 1},
}


def altered_copy(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "altered")
    path = tmp_path / "altered" / "config.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not DROP}))
    return tmp_path / "altered"


@pytest.mark.parametrize("key", FOREIGN_CONFIGS)
def test_import_refuses_a_config_that_it_cannot_honour(key, exported, tmp_path):
    folder = altered_copy(exported, tmp_path, **{key: FOREIGN_CONFIGS[key]})
    with pytest.raises(ForeignModelError) as refusal:
        import_hf(folder)
    words = {"rope_scaling": "RoPE of type linear", "n_group": "n_expert_groups = 5"}
    (problem,) = refusal.value.problems
    assert words.get(key, key) in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mscale", None),
        ("mscale_all_dim", 0),
        ("attention_factor", 1.0),
        ("truncate", False),
        ("partial_rotary_factor", 0.5),
        ("factor", 1.0),
        ("rope_type", "default"),
        ("rope_theta", 17.0),
        ("low_freq_factor", 1.0),
    ],
)
def test_import_refuses_other_kinds_of_yarn(key, value, exported, tmp_path):
    scaling = json.loads((exported / "config.json").read_text())["rope_scaling"]
    folder = altered_copy(exported, tmp_path, rope_scaling={**scaling, key: value})
    with pytest.raises(ForeignModelError) as refusal:
        import_hf(folder)
    (problem,) = refusal.value.problems
    assert (key if key != "rope_type" else "default and yarn") in problem


def test_import_names_all_problems_at_once(exported, tmp_path):
    changes = {"norm_topk_prob": False, "kv_lora_rank": DROP, "hidden_size": "32", "rope_scaling": {"type": "llama3"}}
    with pytest.raises(ForeignModelError) as refusal:
        import_hf(altered_copy(exported, tmp_path, **changes))
    assert len(refusal.value.problems) == len(changes)
    for word in ("norm_topk_prob", "kv_lora_rank", "hidden_size", "llama3"):
        assert word in str(refusal.value)


NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
COPY = "model.layers.3.shared_head.head.weight"
FOREIGN_TENSORS = {
    "missing": (lambda tensors: tensors.pop(NORM), NORM),
    "missing expert": (lambda tensors: tensors.pop(EXPERT), EXPERT),
    "missing MTP tensor": (lambda tensors: tensors.pop("model.layers.4.hnorm.weight"), "model.layers.4.hnorm.weight"),
    "unknown": (lambda tensors: tensors.update(bias=torch.ones(2)), "bias"),
    "another shape": (lambda tensors: tensors.update({NORM: torch.ones(2)}), NORM),
    "another expert's dtype": (lambda tensors: tensors.update({EXPERT: tensors[EXPERT].bfloat16()}), EXPERT),
    "8 bits": (lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}), NORM),
    "MTP with a head of its own": (lambda tensors: tensors.update({COPY: tensors[COPY] + 1}), COPY),
}


@pytest.mark.parametrize("name", FOREIGN_TENSORS)
def test_import_refuses_other_tensors_by_name(name, exported, tmp_path):
    change, named = FOREIGN_TENSORS[name]
    folder = altered_copy(exported, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ForeignModelError) as refusal:
        import_hf(folder)
    (problem,) = refusal.value.problems
    assert named in problem


def test_import_takes_fp16_and_mtp_without_copies(exported, tmp_path):
    folder = altered_copy(exported, tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in list(tensors):
        if is_mtp(name, CONFIG) and name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
            del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    config, imported = import_hf(folder)
    assert config == CONFIG
    for name, tensor in STATE.items():
        assert torch.equal(imported[name], tensor.half()), name


def test_import_refuses_broken_folders(tmp_path):
    sharded = export(CONFIG, STATE, tmp_path / "sharded", max_file_bytes=20_000)
    second = next(sharded.glob("model-00002-*"))
    content = second.read_bytes()

    def refused(folder, *words):
        with pytest.raises(ForeignModelError) as refusal:
            import_hf(folder)
        assert all(word in str(refusal.value) for word in words)

    refused(tmp_path / "nowhere", "config.json")
    second.unlink()
    refused(sharded, second.name)
    second.write_bytes(content[:-1])
    refused(sharded, second.name)
    shutil.copy(next(sharded.glob("model-00001-*")), second)
    refused(sharded, "in two files")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../sharded/model-00001-of-00002.safetensors"}}))
    refused(sharded, "../sharded/model-00001-of-00002.safetensors")
    index.write_text("{")
    refused(sharded, index.name)
    index.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    refused(sharded, index.name)


# The keys of two released models' config.json that decide what is computed, and some of the others.
DEEPSEEK_V3 = {
    **{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61},
    **{"first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8},
    **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "topk_group": 4},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-06},
    **{"rope_theta": 10000, "num_nextn_predict_layers": 1, "initializer_range": 0.02, "hidden_act": "silu"},
    **{"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    **{"attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "aux_loss_alpha": 0.001},
    **{"seq_aux": True, "ep_size": 1, "pretraining_tp": 1, "torch_dtype": "bfloat16", "use_cache": True},
    "rope_scaling": {
        **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
MOONLIGHT = {
    **{key: value for key, value in DEEPSEEK_V3.items() if key != "rope_scaling"},
    **{"vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "first_k_dense_replace": 1},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    **{"intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2},
    **{"num_experts_per_tok": 6, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-05, "rope_theta": 50000.0},
    **{"num_nextn_predict_layers": 0, "rope_scaling": None},
}


@pytest.mark.parametrize(
    ("document", "elements"), [(DEEPSEEK_V3, 671_026_419_200), (MOONLIGHT, 15_960_110_208)], ids=["v3", "moonlight"]
)
def test_released_configs_are_read(document, elements):
    """Their trunks then have as many elements, selection biases included, as the released files."""
    config, problems = model_config(document)
    assert not problems
    assert sum(prod(shape) for name, shape in state_shapes(config).items() if not name.startswith("mtp.")) == elements
    assert (config.yarn is not None) == (document["rope_scaling"] is not None)
