"""Hugging Face's DeepSeek-V3 format: what transformers computes from an export, and what an import gives back.

`transformers` is the oracle for the whole model, so every mistake that it could hide is tried here on our side and must
be seen by the same comparison.
"""

import random
from collections import namedtuple
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference import mla as reference_mla
from nmoe.kernels.reference import rope as reference_rope
from nmoe.kernels.reference import routing as routing_op
from nmoe.kernels.reference.rope import rope_frequencies, yarn_frequencies
from nmoe.model.feed_forward import MixtureOfExperts
from nmoe.model.generation import Sampling, generate
from nmoe.model.hf import export_hf, import_hf
from nmoe.model.hf_weights import is_mtp
from nmoe.model.layers import RotaryEmbedding
from nmoe.model.schema import ModelConfig, YarnConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TOLERANCE = 1e-5
"""Of the largest logit: fp32 rounding (6e-8) through four layers, in two orders of summation."""
BATCH, LENGTH, ORIGINAL_LENGTH = 2, 40, 10

Q_LORA = {"q_lora_rank": 10}
GROUPS = {"n_expert_groups": 4, "n_limited_groups": 2}
YARN = {"yarn": YarnConfig(factor=4.0, original_seq_len=ORIGINAL_LENGTH)}
YARN_TWO_SCALES = {
    "yarn": YarnConfig(
        **{"factor": 4.0, "original_seq_len": ORIGINAL_LENGTH, "beta_fast": 0.4, "beta_slow": 0.05},
        **{"mscale": 0.6, "mscale_all_dim": 1.4},
    )
}
FEATURES = {
    "plain": {},
    "q-lora": {**Q_LORA, "n_shared_experts": 2},
    "groups": GROUPS,
    "yarn": {**YARN, "n_dense_layers": 0, "inter_dim": None},
    "all": {**Q_LORA, **GROUPS, **YARN_TWO_SCALES, "n_shared_experts": 2, "mtp_depth": 2},
    "no-shared-experts": {"n_shared_experts": 0, "n_dense_layers": 2},
    "dense": {
        **{"n_dense_layers": 3, "moe_inter_dim": None, "n_routed_experts": None, "n_activated_experts": None},
        **{"n_shared_experts": 0, "route_scale": 1.0},
    },
}
SEEDS = (0, 1, 2)
SMALL = {"embed", "wo", "w2", "wkv_a", "wq_a", "proj"}


def random_config(features, seed):
    rng = random.Random(seed)
    n_experts = rng.choice((8, 12, 16))
    shape = {
        "vocab_size": rng.randrange(60, 90),
        "dim": rng.choice((24, 32, 40)),
        "n_layers": 3,
        "n_dense_layers": 1,
        "n_heads": rng.randrange(2, 5),
        "norm_eps": rng.choice((1e-6, 1e-5, 3e-5)),
        "kv_lora_rank": rng.choice((8, 12, 16)),
        "qk_nope_head_dim": rng.choice((6, 8, 12)),
        "qk_rope_head_dim": rng.choice((4, 6, 8)),
        "v_head_dim": rng.choice((6, 8, 20)),
        "rope_theta": rng.choice((100.0, 5e4)),
        "inter_dim": rng.randrange(20, 60),
        "moe_inter_dim": rng.randrange(8, 24),
        "n_routed_experts": n_experts,
        "n_shared_experts": 1,
        "n_activated_experts": rng.randrange(2, 5),
        "route_scale": rng.choice((1.5, 2.446)),
        "aux_loss": 0.25,
        "mtp_loss_weight": 0.125,
    }
    return ModelConfig(**{**shape, **features})


def bare_model(config, state=None, dtype=torch.float32):
    ops = select_ops("reference", "cpu")
    model = Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=dtype, seed=0).eval()
    if state is not None:
        model.load_state_dict(state)
    return model


@torch.no_grad()
def random_model(config, seed):
    """Weights that hide nothing: large logits, decided routers with biases that matter, random norm gains, and streams
    so small (RMS about 0.01) that the norms' epsilons count."""
    model = bare_model(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state().items():
        parts = name.split(".")
        if "norm" in parts[-2]:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("router.bias"):
            tensor.normal_(0.0, 0.2, generator=generator)
        else:
            gain = 0.01 if SMALL.intersection(parts) else 1.5
            tensor.normal_(0.0, gain * (1.0 if parts[0] == "embed" else tensor.shape[-1] ** -0.5), generator=generator)
            if "wkv_a" in parts:  # its last rows give the RoPE key, which no norm enlarges again
                tensor[config.kv_lora_rank :].mul_(100)
    return model


def random_tokens(config, seed, length=LENGTH):
    return torch.randint(config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(100 + seed))


def export(model, output, **options):
    options = {"dtype": torch.float32, "eos_id": 0, "max_position_embeddings": 64, "extra_files": {}} | options
    export_hf(model.config, model.state(), output, **options)
    return output


def load_theirs(folder, dtype=torch.float32):
    return transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=dtype, local_files_only=True
    ).eval()


class DifferentLogitsError(AssertionError):
    pass


def require_equal(ours, theirs):
    """The one comparison that all tests share."""
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if not gap <= TOLERANCE:
        raise DifferentLogitsError(f"max|Δ| / max|logit| = {gap:.1e}")


@torch.no_grad()
def compare(model, theirs, token_BS):
    their_logits = theirs(token_BS).logits
    assert their_logits.std() >= 1, "small logits hide mistakes"
    require_equal(model.logits(token_BS), their_logits)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FEATURES)
def test_logits_equal_transformers_and_import_gives_the_same_back(name, seed, tmp_path):
    model = random_model(random_config(FEATURES[name], seed), seed)
    folder = export(model, tmp_path / "out")
    compare(model, load_theirs(folder), random_tokens(model.config, seed))

    config, tensors = import_hf(folder)
    assert config == model.config
    assert tensors.keys() == model.state().keys()
    for tensor_name, tensor in model.state().items():
        assert tensors[tensor_name].dtype == tensor.dtype
        assert torch.equal(tensors[tensor_name], tensor), tensor_name


Exported = namedtuple("Exported", "model folder theirs token_BS")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A model with every feature, exported and loaded by transformers."""
    shape = {"norm_eps": 1e-5, "rope_theta": 100.0, "qk_rope_head_dim": 8}
    config = random_config({**FEATURES["all"], **shape}, seed=2)
    model = random_model(config, seed=2)
    folder = export(model, tmp_path_factory.mktemp("hf") / "out")
    return Exported(model, folder, load_theirs(folder), random_tokens(config, seed=2))


def set_epsilon(name, eps):
    def mutate(model, patch):
        for path, module in model.named_modules():
            if path.split(".")[-1] == name:
                module.eps = eps

    return mutate


def rotate_halves(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def half_rotation(model, patch):
    for module in (reference_mla, reference_rope):
        patch.setattr(module, "apply_rope", rotate_halves)


def scale_softmax(power):
    """Our scale has YaRN's temperature squared; here it has another power of it."""

    def mutate(model, patch):
        for layer in model.layers:
            plain = (layer.attn.nope + layer.attn.rope) ** -0.5
            layer.attn.scale = plain * (layer.attn.scale / plain) ** (power / 2)

    return mutate


def change_yarn(**values):
    def mutate(model, patch):
        yarn = model.config.yarn.model_copy(update=values)
        model.rope = RotaryEmbedding(model.config.model_copy(update={"yarn": yarn}))

    return mutate


def no_yarn(model, patch):
    model.rope = RotaryEmbedding(model.config.model_copy(update={"yarn": None}))


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def change_routing(**values):
    def mutate(model, patch):
        for mixture in mixtures(model):
            mixture.config = mixture.config.model_copy(update=values)

    return mutate


def change_gates(gate):
    """`gate(scores, biased scores)` of the chosen experts instead of ours, which normalises the scores."""

    def mutate(model, patch):
        for mixture in mixtures(model):
            mixture.ops = replace(mixture.ops, route=partial(mutated, mixture.ops.route))

    def mutated(right, logits_TE, bias_E, *, route_scale, **options):
        routing = right(logits_TE, bias_E, route_scale=route_scale, **options)
        score_TE = logits_TE.sigmoid()
        scores_TK, biased_TK = (x.gather(1, routing.expert_TK) for x in (score_TE, score_TE + bias_E))
        return routing._replace(gate_TK=gate(scores_TK, biased_TK) * route_scale)

    return mutate


def normalised(x_TK):
    return x_TK / x_TK.sum(-1, keepdim=True)


def no_bias(model, patch):
    for _, router in model.routers():
        router.bias.zero_()


def best_expert_scores_its_group(model, patch):
    def mutated(choice_TE, n_groups, n_limited_groups):
        choice_TGe = choice_TE.unflatten(1, (n_groups, -1))
        group_TL = choice_TGe.amax(-1).topk(n_limited_groups).indices
        barred_TG = torch.ones(choice_TGe.shape[:2], dtype=torch.bool).scatter_(1, group_TL, False)
        return choice_TGe.masked_fill(barred_TG[:, :, None], float("-inf")).flatten(1)

    patch.setattr(routing_op, "_mask_groups", mutated)


def no_shared_experts(model, patch):
    for layer in model.layers:
        layer.ffn.has_shared = False


def gate_and_up_exchanged(model, patch):
    for name, parameter in model.named_parameters():
        if name.endswith("w13"):
            parameter.data = parameter.flip(-3)


MUTATIONS = {
    "attention norm's epsilon": set_epsilon("attn_norm", 1e-6),
    "feed-forward norm's epsilon": set_epsilon("ffn_norm", 1e-6),
    "final norm's epsilon": set_epsilon("norm", 1e-6),
    "query latent's epsilon is norm_eps": set_epsilon("q_norm", 1e-5),
    "key-value latent's epsilon is norm_eps": set_epsilon("kv_norm", 1e-5),
    "RoPE turns halves, not pairs": half_rotation,
    "no mscale² in the softmax": scale_softmax(0),
    "mscale, not its square": scale_softmax(1),
    "no ratio of mscales on cos and sin": change_yarn(mscale=1.4),
    "ratio of mscales upside down": change_yarn(mscale=1.4, mscale_all_dim=0.6),
    "YaRN's default beta_fast": change_yarn(beta_fast=32.0),
    "YaRN's default beta_slow": change_yarn(beta_slow=1.0),
    "no YaRN": no_yarn,
    "gates not normalised": change_gates(lambda scores, biased: scores),
    "bias in the gates": change_gates(lambda scores, biased: normalised(biased)),
    "softmax over the chosen": change_gates(lambda scores, biased: scores.softmax(-1)),
    "bias not in the choice": no_bias,
    "groups ignored": change_routing(n_expert_groups=1, n_limited_groups=1),
    "a group scored by its best expert alone": best_expert_scores_its_group,
    "no route_scale": change_routing(route_scale=1.0),
    "no shared experts": no_shared_experts,
    "gate and up exchanged": gate_and_up_exchanged,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(name, everything, monkeypatch):
    model = bare_model(everything.model.config, everything.model.state())
    compare(model, everything.theirs, everything.token_BS)
    MUTATIONS[name](model, monkeypatch)
    with pytest.raises(DifferentLogitsError):
        compare(model, everything.theirs, everything.token_BS)


@pytest.mark.parametrize("theta", [1e4, 5e4])
def test_frequencies_are_bitwise_those_of_the_released_models(theta):
    """One rounding apart would be 0.01 rad at position 100 000."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0}
    scaling |= {"mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    plain, extended = (
        DeepseekV3RotaryEmbedding(
            transformers.DeepseekV3Config(rope_theta=theta, rope_scaling=rope_scaling, max_position_embeddings=163840)
        ).inv_freq
        for rope_scaling in (None, scaling)
    )
    ours = yarn_frequencies(64, theta, factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0)
    assert torch.equal(rope_frequencies(64, theta), plain)
    kept = extended == plain
    assert 5 < kept.sum() < 20
    assert torch.equal(ours[kept], plain[kept])
    torch.testing.assert_close(ours, extended, rtol=2**-22, atol=0)


def greedy(model, prompt, eos_id, max_tokens):
    n_ids = model.config.vocab_size
    options = {"max_tokens": max_tokens, "sampling": Sampling(temperature=0.0), "eos_id": eos_id, "n_ids": n_ids}
    return list(generate(model, prompt, **options))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_greedy_generation_token_equal(name, tmp_path):
    """Prefill and decode from the latent cache, far beyond YaRN's original context; then up to an EOS on the way."""
    model = random_model(random_config(FEATURES[name], seed=8), seed=8)
    prompt = random_tokens(model.config, seed=8)[0, :12].tolist()
    free = greedy(model, prompt, eos_id=-1, max_tokens=28)
    assert len(free) == 28
    assert len(set(free)) > 8, "a loop of few tokens would agree by chance"
    eos_id = free[19]
    assert greedy(model, prompt, eos_id, 28) == free[: free.index(eos_id)]

    theirs = load_theirs(export(model, tmp_path / "out", eos_id=eos_id))
    prompt_1S = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(prompt_1S), "do_sample": False, "max_new_tokens": 28}
    their_free = theirs.generate(prompt_1S, **options, eos_token_id=None, pad_token_id=0)
    assert their_free[0, len(prompt) :].tolist() == free
    until_eos = theirs.generate(prompt_1S, **options, pad_token_id=0)
    assert until_eos[0, len(prompt) :].tolist() == free[: free.index(eos_id) + 1]


@torch.no_grad()
def test_mtp_states_equal_transformers(everything):
    """The exported modules, run by transformers on its own trunk: equations 21 and 22 at both depths."""
    from transformers.modeling_layers import MtpModel

    model, theirs, token_BS = everything.model, everything.theirs, everything.token_BS
    first = model.config.n_layers
    # transformers knows the MTP tensors of the 61 layers that were released; ours begin at another layer.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({first}|{first + 1})\."]
    modules = MtpModel.from_pretrained(theirs).eval()

    their_state, our_state = theirs.model(token_BS).last_hidden_state, model.hidden(token_BS)
    for depth, module in enumerate(model.mtp, start=1):
        length = LENGTH - depth
        positions = torch.arange(length)[None]
        their_state = modules.forward_layer(
            depth - 1, their_state[:, :length], positions, None, input_ids=token_BS[:, depth:]
        )
        rope = model.rope(0, length, token_BS.device)
        our_state = module(our_state[:, :length], model.embed(token_BS[:, depth:]), rope).out_BSD
        require_equal(model.head(our_state), theirs.lm_head(their_state))


def test_released_mtp_projection_takes_the_embedding_first(everything):
    model, tensors = everything.model, load_file(everything.folder / "model.safetensors")
    width = model.config.dim
    for depth, module in enumerate(model.mtp):
        released = tensors[f"model.layers.{model.config.n_layers + depth}.eh_proj.weight"]
        assert torch.equal(released[:, :width], module.proj.weight[:, width:])
        assert torch.equal(released[:, width:], module.proj.weight[:, :width])


def test_tensor_names_are_the_released_ones(everything, tmp_path):
    """The trunk's are those that transformers writes itself; an MTP module's block has the last layer's."""
    everything.theirs.save_pretrained(tmp_path / "saved")
    exported, saved = (
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (everything.folder, tmp_path / "saved")
    )
    config = everything.model.config
    assert {name: shape for name, shape in exported.items() if not is_mtp(name, config)} == saved

    last, width, vocabulary = config.n_layers - 1, config.dim, config.vocab_size
    block = {name: shape for name, shape in saved.items() if name.startswith(f"model.layers.{last}.")}
    for layer in range(config.n_layers, config.n_layers + config.mtp_depth):
        prefix = f"model.layers.{layer}."
        own = {
            "embed_tokens.weight": (vocabulary, width),
            "enorm.weight": (width,),
            "hnorm.weight": (width,),
            "eh_proj.weight": (width, 2 * width),
            "shared_head.norm.weight": (width,),
            "shared_head.head.weight": (vocabulary, width),
        }
        expected = {prefix + name: shape for name, shape in own.items()}
        expected |= {name.replace(f"model.layers.{last}.", prefix): shape for name, shape in block.items()}
        assert {name: shape for name, shape in exported.items() if name.startswith(prefix)} == expected


def test_import_of_what_transformers_saves_again(everything, tmp_path):
    """transformers drops the MTP modules and writes the config in its own way."""
    everything.theirs.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    config, tensors = import_hf(tmp_path / "saved")
    assert config == everything.model.config.model_copy(update={"mtp_depth": 0})
    compare(bare_model(config, tensors), everything.theirs, everything.token_BS)


@pytest.mark.parametrize("n_shared_experts", [1, 0])
def test_import_of_a_model_that_transformers_made(n_shared_experts, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 10}
    config = transformers.DeepseekV3Config(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 12},
        **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"n_routed_experts": 8, "n_shared_experts": n_shared_experts, "num_experts_per_tok": 3},
        **{"n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 6},
        **{"qk_nope_head_dim": 8, "v_head_dim": 10, "max_position_embeddings": 40, "initializer_range": 0.4},
        rope_parameters={**rope, "mscale": 0.8, "mscale_all_dim": 1.2},
        attn_implementation="eager",
        experts_implementation="eager",
    )
    torch.manual_seed(5)
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    ours, tensors = import_hf(tmp_path / "saved")
    assert (ours.n_shared_experts, ours.mtp_depth) == (n_shared_experts, 0)
    compare(bare_model(ours, tensors), theirs, random_tokens(ours, seed=5))


def test_bf16_export(everything, tmp_path):
    """Weights are rounded once; the selection bias stays fp32; transformers chooses bf16 by itself."""
    folder = export(everything.model, tmp_path / "out", dtype=torch.bfloat16)
    config, tensors = import_hf(folder)
    assert config == everything.model.config
    for name, tensor in everything.model.state().items():
        dtype = torch.float32 if name.endswith("router.bias") else torch.bfloat16
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor.to(dtype)), name
    assert load_theirs(folder, dtype="auto").lm_head.weight.dtype == torch.bfloat16
    widened = bare_model(config, {name: tensor.float() for name, tensor in tensors.items()})
    compare(widened, load_theirs(folder), everything.token_BS)


def test_sharded_export_equals_transformers(everything, tmp_path):
    folder = export(everything.model, tmp_path / "out", max_file_bytes=50_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    compare(everything.model, load_theirs(folder), everything.token_BS)
