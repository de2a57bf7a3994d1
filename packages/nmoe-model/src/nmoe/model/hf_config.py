"""`config.json` of Hugging Face's DeepSeek-V3 format, from and to a `ModelConfig`. Imports no torch.

Written is the released form (`rope_theta` and `rope_scaling` at the top), which every reader knows, transformers 5
included; read is also the form that transformers 5 saves (`rope_parameters`).
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from nmoe.model.errors import UnsupportedByFormatError
from nmoe.model.schema import ModelConfig, YarnConfig
from pydantic import BaseModel, ValidationError

_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "mtp_depth": "num_nextn_predict_layers",
}
_DENSE_FIELDS = {"inter_dim": "intermediate_size"}
_EXPERT_FIELDS = {
    "moe_inter_dim": "moe_intermediate_size",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
}
_YARN_FIELDS = {
    "factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_TRAINING_FIELDS = ("router_bias_update_rate", "seq_balance_loss", "aux_loss", "mtp_loss_weight")
_TRAINING = "nmoe"
"""Key of a table of our own: what only training reads, so that an import gives the config back whole."""

_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
"""What is always so in our model, and every reader's default where a file leaves it out."""

_OPTIONAL = ("initializer_range", "num_nextn_predict_layers")

Section = TypeVar("Section", bound=BaseModel)


def released_config(
    config: ModelConfig, *, torch_dtype: str, eos_id: int, max_position_embeddings: int
) -> dict[str, Any]:
    """`config.json` of `config`.

    Args:
        config: the model.
        torch_dtype: `float32` or `bfloat16`, of the weights.
        eos_id: the token that ends a text.
        max_position_embeddings: positions that the model serves, YaRN's extension included.

    Raises:
        UnsupportedByFormatError: the format cannot express the model; every key in the way is named.
    """
    problems = export_problems(config)
    if problems:
        raise UnsupportedByFormatError(problems)
    document: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": torch_dtype,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "max_position_embeddings": max_position_embeddings,
        "num_key_value_heads": config.n_heads,
        "use_cache": True,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if config.yarn is not None:
        yarn = {key: getattr(config.yarn, field) for field, key in _YARN_FIELDS.items()}
        document["rope_scaling"] = {"type": "yarn", **yarn}
    document |= {
        key: getattr(config, field) for field, key in _used_fields(config.n_dense_layers, config.n_layers).items()
    }
    document |= _FIXED
    document[_TRAINING] = {field: getattr(config, field) for field in _TRAINING_FIELDS}
    return document


def export_problems(config: ModelConfig) -> dict[str, str]:
    """What of a model the released format cannot express, by key; empty where `released_config` takes it."""
    problems = {}
    if config.attn != "mla":
        problems["attn"] = f"= {config.attn!r} (the format knows 'mla' only)"
    if any(config.is_local(layer) for layer in range(config.n_layers)):
        problems["attn_local"] = f"= {config.attn_local!r} (in the format every layer sees all positions)"
    if config.mtp_depth and not config.has_moe:
        problems["mtp_depth"] = f"= {config.mtp_depth} without experts (in the format MTP modules always have them)"
    if config.has_moe and config.n_routed_experts == 1:
        problems["n_routed_experts"] = "= 1 (readers score a group of experts by its best two)"
    return problems


def _used_fields(n_dense_layers: int, n_layers: int) -> dict[str, str]:
    """Our fields and the released keys of what such a model has: the rest of either is noise."""
    dense = _DENSE_FIELDS if n_dense_layers > 0 else {}
    experts = _EXPERT_FIELDS if n_dense_layers < n_layers else {}
    return {**_FIELDS, **dense, **experts}


def model_config(document: Any) -> tuple[ModelConfig | None, list[str]]:
    """The `ModelConfig` of a parsed `config.json`, or None and every reason why there is none.

    `mtp_depth` is what the file says; whether the folder holds the modules is another matter.
    """
    if not isinstance(document, Mapping):
        return None, [f"config.json holds a {type(document).__name__}, not an object"]
    if document.get("model_type") != "deepseek_v3":
        return None, [f"model_type = {document.get('model_type')!r}, not 'deepseek_v3'"]
    document = dict(document)
    if "num_mtp_layers" in document:  # an alias that transformers takes too
        document.setdefault("num_nextn_predict_layers", document["num_mtp_layers"])

    problems = [
        f"{key} = {document[key]!r}, not {value!r}"
        for key, value in _FIXED.items()
        if key in document and document[key] != value
    ]
    if document.get("quantization_config") is not None:
        problems.append("quantization_config (weights of 16 or 32 bits are read)")
    heads = document.get("num_key_value_heads")
    if heads is not None and heads != document.get("num_attention_heads"):
        problems.append(f"num_key_value_heads = {heads!r}, not num_attention_heads (MLA has no groups of heads)")

    layers, dense = (document.get(key) for key in ("num_hidden_layers", "first_k_dense_replace"))
    if isinstance(layers, int) and isinstance(dense, int):
        # The class's own default may exceed a shallow model's depth, which then is dense throughout.
        document["first_k_dense_replace"] = dense = min(dense, layers)
        fields = _used_fields(dense, layers)
    else:
        fields = {**_FIELDS, **_DENSE_FIELDS, **_EXPERT_FIELDS}
    values: dict[str, Any] = {"attn": "mla", **_rope(document, problems), **_training(document, problems)}
    missing = [key for key in fields.values() if key not in document and key not in _OPTIONAL]
    problems += [f"no {key}" for key in missing]
    values |= {field: document[key] for field, key in fields.items() if key in document}
    if values.get("n_shared_experts", 0) is None:
        values["n_shared_experts"] = 0
    config = _validated(ModelConfig, values, fields, problems, is_whole=not missing)
    return (None, problems) if problems else (config, [])


def _training(document: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    table = document.get(_TRAINING, {})
    unknown = sorted(set(table) - set(_TRAINING_FIELDS)) if isinstance(table, Mapping) else [repr(table)]
    problems += [f"{_TRAINING}.{name}, a key of another version of nmoe" for name in unknown]
    return {} if unknown else dict(table)


def _rope(document: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Values of `rope_theta` and `yarn`."""
    tables = [document[key] for key in ("rope_scaling", "rope_parameters") if document.get(key)]
    if any(not isinstance(table, Mapping) or table != tables[0] for table in tables):
        problems.append("rope_scaling or rope_parameters that is no table, or two that differ")
        return {}
    table = {key: value for key, value in tables[0].items() if value is not None} if tables else {}

    thetas = [source["rope_theta"] for source in (table, document) if "rope_theta" in source]
    if not thetas or thetas[0] != thetas[-1]:
        problems.append("two values of rope_theta" if thetas else "no rope_theta")
    kinds = {str(table[key]) for key in ("type", "rope_type") if key in table} or {"default"}
    if kinds not in ({"default"}, {"yarn"}):
        problems.append(f"RoPE of type {' and '.join(sorted(kinds))}, not 'default' or 'yarn'")
        return {}

    neutral = {"partial_rotary_factor": 1, "truncate": True}
    known = {"type", "rope_type", "rope_theta", *(_YARN_FIELDS.values() if kinds == {"yarn"} else ())}
    problems += [
        f"RoPE parameter {key} = {value!r}"
        for key, value in table.items()
        if key not in known and not (key in neutral and neutral[key] == value)
    ]
    rope: dict[str, Any] = {"rope_theta": thetas[0]} if thetas else {}
    if kinds == {"yarn"}:
        rope["yarn"] = _yarn(table, problems)
    return rope


def _yarn(table: Mapping[str, Any], problems: list[str]) -> YarnConfig | None:
    # Without one of these, readers fall back to another temperature than DeepSeek's, and not all to the same.
    needed = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
    missing = [f"RoPE of type yarn without {key}" for key in needed if not table.get(key)]
    if missing:
        problems += missing
        return None
    values = {field: table[key] for field, key in _YARN_FIELDS.items() if key in table}
    return _validated(YarnConfig, values, _YARN_FIELDS, problems, is_whole=True)


def _validated(
    kind: type[Section], values: Mapping[str, Any], fields: Mapping[str, str], problems: list[str], *, is_whole: bool
) -> Section | None:
    """A section of `values`, or None and more problems; rules over several fields are judged of whole ones only."""
    try:
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        for item in error.errors():
            field = ".".join(map(str, item["loc"]))
            if field and item["type"] != "missing":
                problems.append(f"{fields.get(field, field)} = {item['input']!r}: {item['msg']}")
            elif not field and is_whole:
                problems.append(item["msg"].removeprefix("Value error, "))
        return None
