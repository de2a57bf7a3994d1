"""Dense and expert feed-forward parts against loops, the router's bias, and the balance losses of the papers."""

import math
from dataclasses import replace

import pytest
import torch
from nmoe.model.feed_forward import MixtureOfExperts, Mlp

TOKENS_A_SEQUENCE = 5
APPLIED, REFUSED = torch.ones((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)


def naive_mlp(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    gate, up = w13[0] @ x, w13[1] @ x
    return w2 @ (gate / (1 + (-gate).exp()) * up)


def experts_layer(build, config) -> MixtureOfExperts:
    layer = build(config).layers[-1].ffn
    assert isinstance(layer, MixtureOfExperts)
    return layer


def states(config, n_sequences: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_sequences, TOKENS_A_SEQUENCE, config.dim)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_dense_mlp_equals_the_loop(tiny, build) -> None:
    config = tiny()
    mlp = build(config).layers[0].ffn
    assert isinstance(mlp, Mlp)
    x = states(config)
    expected = torch.stack([torch.stack([naive_mlp(t, mlp.w13, mlp.w2) for t in sequence]) for sequence in x])
    torch.testing.assert_close(mlp(x), expected, rtol=1e-11, atol=1e-13)


def scores(layer: MixtureOfExperts, token: torch.Tensor) -> list[float]:
    return [1 / (1 + math.exp(-float(w @ token))) for w in layer.router.weight.detach()]


def chosen_by_hand(score: list[float], bias: list[float], config) -> list[int]:
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(score) // config.n_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_expert_groups)]
    merit = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-merit[g], g))[: config.n_limited_groups]
    reach = [e for g in best for e in groups[g]] if config.n_expert_groups > 1 else range(len(score))
    return sorted(reach, key=lambda e: (-biased[e], e))[: config.n_activated_experts]


@pytest.mark.parametrize("name", ["everything", "mla"])
def test_mixture_equals_the_loop(tiny, build, name: str) -> None:
    """Equations 12 to 16: shared experts, plus gates of unbiased scores over experts of biased ones."""
    config = tiny(name)
    layer, x = experts_layer(build, config), states(config)
    experts, bias, rows = layer.experts, layer.router.bias.double().tolist(), []
    for token in x.flatten(0, 1):
        score = scores(layer, token)
        chosen = chosen_by_hand(score, bias, config)
        out = naive_mlp(token, layer.shared.w13, layer.shared.w2)
        for e in chosen:
            gate = config.route_scale * score[e] / sum(score[c] for c in chosen)
            out = out + gate * naive_mlp(token, experts.w13[e], experts.w2[e])
        rows.append(out)
    torch.testing.assert_close(layer(x).out_BSD, torch.stack(rows).view_as(x), rtol=1e-10, atol=1e-12)


def test_shared_experts_are_one_wider_mlp(tiny, build) -> None:
    config = tiny(n_shared_experts=3)
    assert experts_layer(build, config).shared.w2.shape == (config.dim, 3 * config.moe_inter_dim)
    none = experts_layer(build, tiny(n_shared_experts=0))
    assert not any("shared" in name for name, _ in none.named_parameters())


def test_router_stays_in_float32_in_a_bfloat16_model(tiny, build) -> None:
    config = tiny()
    layer = build(config, dtype=torch.bfloat16).layers[-1].ffn
    assert layer.experts.w13.dtype == torch.bfloat16
    assert layer.router.weight.dtype == torch.float32
    assert layer.router.bias.dtype == torch.float32
    x = states(config).flatten(0, 1).bfloat16()
    logits, _ = layer.router(x)
    assert logits.dtype == torch.float32
    assert layer.ops.route(logits, layer.router.bias, top_k=2).gate_TK.dtype == torch.float32
    exact = 1 / (1 + (-(x.double() @ layer.router.weight.double().T)).exp())
    # Scores of bf16 logits would err by up to 2^-9.
    torch.testing.assert_close(logits.sigmoid().double(), exact, rtol=1e-5, atol=0)


def test_load_is_the_rows_routed_to_each_expert(tiny, build) -> None:
    config = tiny()
    layer, x = experts_layer(build, config), states(config)
    routed = []
    right = layer.ops.route
    layer.ops = replace(layer.ops, route=lambda *a, **k: routed.append(right(*a, **k)) or routed[0])
    load_E = layer(x).load_E
    assert load_E.tolist() == torch.bincount(routed[0].expert_TK.flatten(), minlength=6).tolist()
    assert load_E.sum() == x.shape[0] * x.shape[1] * config.n_activated_experts
    assert not layer.router.load.any(), "a layer counts nothing itself: it may run twice for one batch"


def test_training_losses_count_the_loads_and_evaluations_do_not(tiny, build) -> None:
    model = build(tiny())
    token = torch.arange(16).view(2, 8) % 19
    model.eval().score(token, token)
    model.training_loss(token, 14)
    assert not any(router.load.any() for _, router in model.routers()), "evaluation is not counted"
    model.train().training_loss(token, 14)
    rows = {name: 2 * 2 * (6 if "mtp.0" in name else 5 if "mtp.1" in name else 7) for name, _ in model.routers()}
    assert {name: router.load.sum() for name, router in model.routers()} == rows
    once = {name: router.load.clone() for name, router in model.routers()}
    assert len({tuple(load.tolist()) for load in once.values()}) > 1, "each router has its own"
    model.training_loss(token, 14)
    assert all(torch.equal(router.load, 2 * once[name]) for name, router in model.routers()), "micro-batches add up"


def test_bias_moves_by_the_sign_of_the_violation(tiny, build) -> None:
    """arXiv:2408.15664, algorithm 1: up for the underloaded, down for the overloaded, by one rate."""
    router = experts_layer(build, tiny(router_bias_update_rate=0.01)).router
    router.bias.zero_()
    router.load.copy_(torch.tensor([40.0, 10.0, 20.0, 20.0, 19.0, 11.0]))  # mean 20
    router.update_bias(APPLIED)
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0.0, 0.0, 0.01, 0.01]))
    assert not router.load.any(), "the next step counts anew"
    before = router.bias.clone()
    router.update_bias(APPLIED)
    assert torch.equal(router.bias, before), "nothing was routed, nothing moves"
    router.load.copy_(torch.tensor([40.0, 10.0, 20.0, 20.0, 19.0, 11.0]))
    router.update_bias(REFUSED)
    assert torch.equal(router.bias, before), "a step that is not applied moves nothing"
    assert not router.load.any(), "nor does it count for the next one"


def test_bias_updates_even_out_the_load(tiny, build) -> None:
    config = tiny("mla", router_bias_update_rate=0.02)
    layer, x = experts_layer(build, config), states(config, n_sequences=40)
    with torch.no_grad():
        layer.router.bias.zero_()
        layer.router.weight[0] += x.flatten(0, 1).mean(0) * 20 + 0.5  # expert 0 is liked best
    worst = []
    for _ in range(60):
        layer.router.load += layer(x).load_E
        worst.append(float(layer.router.load.max() / layer.router.load.mean()))
        layer.router.update_bias(APPLIED)
    assert worst[-1] < 1.3
    assert worst[-1] < worst[0]


def test_evaluation_and_plain_forwards_never_move_the_bias(tiny, build) -> None:
    model = build(tiny())
    kept = [router.bias.clone() for _, router in model.routers()]
    token = torch.arange(14).view(2, 7)
    model.eval().score(token, token)
    model.train().training_loss(token, 12).total.backward()
    assert all(torch.equal(router.bias, bias) for (_, router), bias in zip(model.routers(), kept, strict=True))
    assert all(not router.bias.requires_grad for _, router in model.routers())


def sequence_balance(layer: MixtureOfExperts, x: torch.Tensor, alpha: float, mistake: str = "") -> float:
    """DeepSeek-V3 report, equations 17 to 20, summed over sequences."""
    config, total = layer.config, 0.0
    n_experts, top_k = config.n_routed_experts, config.n_activated_experts
    bias = layer.router.bias.double().tolist()
    for sequence in x:
        length = sequence.shape[0]
        f, p = [0.0] * n_experts, [0.0] * n_experts
        for token in sequence:
            score = scores(layer, token)
            best = sorted(range(n_experts), key=lambda e: (-score[e], e))[:top_k]  # equation 18: of s, not of s + b
            if mistake == "biased choice":
                best = chosen_by_hand(score, bias, config)
            for e in best:
                f[e] += n_experts / (top_k * length) * (1 if mistake != "K left out" else top_k)
            norm = 1.0 if mistake == "shares not normalised" else sum(score)
            for e in range(n_experts):
                p[e] += score[e] / norm / length
        total += alpha * sum(a * b for a, b in zip(f, p, strict=True))
    return total / (len(x) if mistake == "mean over sequences" else 1)


def switch_balance(layer: MixtureOfExperts, x: torch.Tensor, alpha: float) -> float:
    """arXiv:2101.03961, equations 4 to 6, for K choices a token: α·E·Σ_e f_e·P_e over the micro-batch, f_e the fraction
    of the choices that went to e. Times the sequences, since a balance loss is a sum over them."""
    config = layer.config
    tokens = x.flatten(0, 1)
    n_experts, top_k = config.n_routed_experts, config.n_activated_experts
    f, p = [0.0] * n_experts, [0.0] * n_experts
    for token in tokens:
        score = scores(layer, token)
        for e in chosen_by_hand(score, layer.router.bias.double().tolist(), config):
            f[e] += 1 / (top_k * len(tokens))
        for e in range(n_experts):
            p[e] += score[e] / sum(score) / len(tokens)
    return alpha * n_experts * sum(a * b for a, b in zip(f, p, strict=True)) * x.shape[0]


@pytest.mark.parametrize("name", ["everything", "mla"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_balance_losses_equal_the_papers(tiny, build, name: str, alpha: float, beta: float) -> None:
    config = tiny(name, seq_balance_loss=alpha, aux_loss=beta)
    layer, x = experts_layer(build, config), states(config)
    found = layer(x).balance.detach()
    expected = sequence_balance(layer, x, alpha) + switch_balance(layer, x, beta)
    assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("mistake", ["biased choice", "K left out", "shares not normalised", "mean over sequences"])
def test_the_equations_tell_mistakes_apart(tiny, build, mistake: str) -> None:
    config = tiny(seq_balance_loss=0.1, aux_loss=0.0)
    layer, x = experts_layer(build, config), states(config)
    assert float(layer(x).balance.detach()) != pytest.approx(sequence_balance(layer, x, 0.1, mistake), rel=1e-4)


def test_a_balanced_router_pays_exactly_its_weight(tiny, build) -> None:
    """The least that either loss can be, a sequence: what is left is α, so that α is comparable between shapes."""
    config = tiny("mla", seq_balance_loss=0.25)
    layer = experts_layer(build, config)
    layer.router.bias.zero_()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(6, config.dim))
    # Token t likes experts t and t + 1 (mod 6) best; over six tokens each is liked twice.
    x = torch.zeros(1, 6, config.dim, dtype=torch.float64)
    for t in range(6):
        x[0, t, t], x[0, t, (t + 1) % 6] = 2.0, 1.0
    assert float(layer(x).balance.detach()) == pytest.approx(0.25, rel=1e-12)


def test_balance_loss_pushes_scores_together(tiny, build) -> None:
    """A step down its gradient lowers the loss, and no gradient goes around the scores."""
    config = tiny("mla", seq_balance_loss=1.0)
    layer, x = experts_layer(build, config), states(config)
    loss = layer(x).balance
    loss.backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert grads["router.weight"].any()
    assert all(grad is None for name, grad in grads.items() if name != "router.weight")
    with torch.no_grad():
        layer.router.weight -= 0.05 * grads["router.weight"]
    assert layer(x).balance < loss


def test_no_balance_loss_where_none_is_asked_or_in_evaluation(tiny, build) -> None:
    config = tiny("mla")
    assert experts_layer(build, config)(states(config)).balance is None
    config = tiny("everything")
    assert experts_layer(build, config).eval()(states(config)).balance is None


def test_router_gradient_comes_through_the_gates(tiny, build) -> None:
    """Detached gates, a plausible slip, would leave the router without a gradient."""
    config = tiny("mla")
    layer, x = experts_layer(build, config), states(config)
    layer(x).out_BSD.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3
    layer.zero_grad()
    right = layer.ops.route
    detached = lambda *a, **k: (r := right(*a, **k))._replace(gate_TK=r.gate_TK.detach())  # noqa: E731
    layer.ops = replace(layer.ops, route=detached)
    layer(x).out_BSD.square().sum().backward()
    assert layer.router.weight.grad is None
