"""What the model tests share: one thread, and tiny configurations with everything or little on."""

from collections.abc import Callable, Iterator

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig, YarnConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

MLA = {"attn": "mla", "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 3}
SDPA = {"attn": "sdpa", "head_dim": 6}
SWA = {"attn_local": "swa", "attn_global_every": 2, "attn_local_window": 3}
FEED_FORWARD = {
    "inter_dim": 10,
    "moe_inter_dim": 5,
    "n_routed_experts": 6,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "route_scale": 1.5,
}
BASE = {
    "vocab_size": 19,
    "dim": 12,
    "n_layers": 4,
    "n_dense_layers": 1,
    "n_heads": 2,
    "init_std": 0.3,
    "norm_eps": 1e-2,  # large enough to tell which norms it belongs to
    **FEED_FORWARD,
}
EVERYTHING = {
    **BASE,
    **MLA,
    **SWA,
    "q_lora_rank": 5,
    "yarn": YarnConfig(factor=4.0, original_seq_len=4, mscale=0.7, mscale_all_dim=1.3),
    "n_expert_groups": 3,
    "n_limited_groups": 2,
    "mtp_depth": 2,
    "seq_balance_loss": 0.05,
    "aux_loss": 0.03,
}
CONFIGS = {
    "everything": EVERYTHING,
    "mla": {**BASE, **MLA},
    "mla_swa_mtp": {**BASE, **MLA, **SWA, "mtp_depth": 1},
    "sdpa": {**BASE, **SDPA, "qk_norm": True},
    "sdpa_swa_mtp": {**BASE, **SDPA, **SWA, "mtp_depth": 2},
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """`tiny(name, **changes)`: one of CONFIGS."""
    return lambda name="everything", **changes: ModelConfig(**(CONFIGS[name] | changes))


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """`build(config, dtype=float64, seed=0)`: a model on the CPU, with random norm gains and selection biases, so that
    no part can hide behind ones and zeros."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
        ops = select_ops("reference", "cpu")
        model = Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    assert "norm" in name
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            for _, router in model.routers():
                router.bias.copy_(0.3 * torch.randn(router.bias.shape, generator=generator))
        return model

    return make
