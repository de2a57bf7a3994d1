"""A plain second implementation of the whole model, position by position, in float64: trunk, MTP (DeepSeek-V3 report,
equations 21 to 25) and loss, with its gradients by autograd.

It shares nothing with the model but the names of the weights. Positions and tokens are counted from 0 here, from 1 in
the paper: depth k at position i reads the embedding of token i + k and predicts token i + k + 1.
"""

import math

import pytest
import torch

Weights = dict[str, torch.Tensor]
CONFIGS = ["mla", "mla_swa_mtp", "sdpa", "sdpa_swa_mtp", "everything"]
NO_YARN = {"yarn": None, "seq_balance_loss": 0.0, "aux_loss": 0.0}
"""YaRN and the balance losses have oracles of their own."""


class Plain:
    """The model of `config` over `weights`; `mistake` names one plausible error to make."""

    def __init__(self, config, weights: Weights, biases: list[torch.Tensor], mistake: str = "") -> None:
        self.config, self.weights, self.mistake = config, weights, mistake
        self.biases = dict(zip((n for n in weights if n.endswith("router.weight")), biases, strict=True))

    def norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        return x / (x.pow(2).mean() + (self.config.norm_eps if eps is None else eps)).sqrt() * self.weights[name]

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        out, half = list(x), len(x) // 2
        for i in range(half):
            angle = position * self.config.rope_theta ** (-2 * i / len(x))
            at, beside = (i, half + i) if self.mistake == "half rotation" else (2 * i, 2 * i + 1)
            a, b = x[at], x[beside]
            out[at], out[beside] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return torch.stack(out)

    def queries_keys_values(self, x: torch.Tensor, position: int, prefix: str) -> tuple[list[torch.Tensor], ...]:
        """Of one token, by head."""
        c, w = self.config, self.weights
        heads = range(c.n_heads)
        if c.attn == "sdpa":
            q, k, v = ((matrix @ x).view(c.n_heads, -1) for matrix in w[f"{prefix}wqkv"])
            if c.qk_norm:
                q, k = ([self.norm(t[h], f"{prefix}{n}_norm.weight") for h in heads] for t, n in ((q, "q"), (k, "k")))
            return [self.rotate(q[h], position) for h in heads], [self.rotate(k[h], position) for h in heads], list(v)
        nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
        eps = None if self.mistake == "latent norms like the others" else 1e-6
        if c.q_lora_rank is None:
            q = w[f"{prefix}wq.weight"] @ x
        else:
            q = w[f"{prefix}wq_b.weight"] @ self.norm(w[f"{prefix}wq_a.weight"] @ x, f"{prefix}q_norm.weight", eps)
        q = q.view(c.n_heads, -1)
        latent = w[f"{prefix}wkv_a.weight"] @ x
        shared_key = self.rotate(latent[rank:], position)
        kv = (w[f"{prefix}wkv_b.weight"] @ self.norm(latent[:rank], f"{prefix}kv_norm.weight", eps)).view(c.n_heads, -1)
        queries = [torch.cat((q[h, :nope], self.rotate(q[h, nope:], position))) for h in heads]
        return queries, [torch.cat((kv[h, :nope], shared_key)) for h in heads], [kv[h, nope:] for h in heads]

    def attend(self, rows: list[torch.Tensor], prefix: str, layer: int) -> list[torch.Tensor]:
        c = self.config
        tokens = [self.queries_keys_values(x, i, prefix) for i, x in enumerate(rows)]
        window = c.attn_local_window if c.is_local(layer) and self.mistake != "local layers global" else None
        if window and self.mistake == "window one wider":
            window += 1
        out = []
        for i in range(len(rows)):
            heads = []
            for h in range(c.n_heads):
                seen = [j for j in range(i + 1) if window is None or i - j < window]
                width = len(tokens[i][2 if self.mistake == "scale of the value width" else 0][h])
                scores = torch.stack([tokens[i][0][h] @ tokens[j][1][h] for j in seen]) / math.sqrt(width)
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weight * tokens[j][2][h] for weight, j in zip(weights, seen, strict=True)))
            out.append(self.weights[f"{prefix}wo.weight"] @ torch.cat(heads))
        return out

    def mlp(self, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate, up = w13[0] @ x, w13[1] @ x
        return w2 @ (gate * gate.sigmoid() * up)

    def feed(self, x: torch.Tensor, prefix: str, layer: int) -> torch.Tensor:
        c, w = self.config, self.weights
        if c.is_dense(layer):
            return self.mlp(x, w[f"{prefix}w13"], w[f"{prefix}w2"])
        score = (w[f"{prefix}router.weight"] @ x).sigmoid()
        biased = (score + self.biases[f"{prefix}router.weight"]).tolist()
        size = c.n_routed_experts // c.n_expert_groups
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_expert_groups)]
        merit = [sum(sorted(biased[e] for e in group)[-2:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -merit[g])[: c.n_limited_groups]
        reach = [e for g in best for e in groups[g]]
        chosen = sorted(reach, key=lambda e: -biased[e])[: c.n_activated_experts]
        if self.mistake == "bias in the gates":
            score = score + self.biases[f"{prefix}router.weight"]
        total = 1 if self.mistake == "gates not normalised" else sum(score[e] for e in chosen)
        out = self.mlp(x, w[f"{prefix}shared.w13"], w[f"{prefix}shared.w2"])
        for e in chosen:
            expert = self.mlp(x, w[f"{prefix}experts.w13"][e], w[f"{prefix}experts.w2"][e])
            out = out + c.route_scale * score[e] / total * expert
        return out

    def block(self, rows: list[torch.Tensor], prefix: str, layer: int) -> list[torch.Tensor]:
        normed = [self.norm(x, f"{prefix}attn_norm.weight") for x in rows]
        rows = [x + y for x, y in zip(rows, self.attend(normed, f"{prefix}attn.", layer), strict=True)]
        return [x + self.feed(self.norm(x, f"{prefix}ffn_norm.weight"), f"{prefix}ffn.", layer) for x in rows]

    def trunk(self, tokens: list[int]) -> list[torch.Tensor]:
        rows = [self.weights["embed.weight"][t] for t in tokens]
        for layer in range(self.config.n_layers):
            rows = self.block(rows, f"layers.{layer}.", layer)
        return rows if self.mistake == "raw trunk state" else [self.norm(x, "norm.weight") for x in rows]

    def nll(self, state: torch.Tensor, target: int) -> torch.Tensor:
        logits = self.weights["head.weight"] @ state
        return logits.exp().sum().log() - logits[target]

    def mtp(self, states: list[torch.Tensor], tokens: list[int], depth: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Equations 21 to 24 for one depth: its states, and the sum of its tokens' losses."""
        prefix, wrong = f"mtp.{depth - 1}.", self.mistake
        joined = []
        for i in range(len(tokens) - 1 - depth):
            offset = depth - 1 if wrong == "embedding one early" else depth
            hidden = self.norm(states[i], f"{prefix}hidden_norm.weight")
            embedded = self.norm(self.weights["embed.weight"][tokens[i + offset]], f"{prefix}embed_norm.weight")
            halves = (embedded, hidden) if wrong == "embedding first" else (hidden, embedded)
            joined.append(self.weights[f"{prefix}proj.weight"] @ torch.cat(halves))
        last_local = self.config.n_layers - 2
        layer = last_local if wrong == "local block" else self.config.n_layers + depth - 1
        rows = self.block(joined, f"{prefix}block.", layer)
        states = [self.norm(x, "norm.weight" if wrong == "trunk's norm" else f"{prefix}norm.weight") for x in rows]
        ahead = depth if wrong == "target one early" else depth + 1
        return states, sum(self.nll(state, tokens[i + ahead]) for i, state in enumerate(states))

    def loss(self, tokens: list[int], n_tokens: int) -> torch.Tensor:
        """Next-token loss plus equation 25."""
        states = self.trunk(tokens[:-1])
        normed = [self.norm(x, "norm.weight") for x in states] if self.mistake == "raw trunk state" else states
        total = sum(self.nll(state, tokens[i + 1]) for i, state in enumerate(normed)) / n_tokens
        depths = self.config.mtp_depth
        for depth in range(1, depths + 1):
            states, nll = self.mtp(states, tokens, depth)
            count = (
                n_tokens * len(states) / (len(tokens) - 1) if self.mistake == "divided by its own count" else n_tokens
            )
            mean = 1 if self.mistake == "sum over depths" else depths
            total = total + self.config.mtp_loss_weight / mean * nll / count
        return total


def plain_of(model, mistake: str = "") -> Plain:
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return Plain(model.config, weights, [router.bias.double() for _, router in model.routers()], mistake)


def samples(config, length: int = 7, count: int = 2) -> torch.Tensor:
    return torch.randint(config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_trunk_equals_the_plain_one(tiny, build, name: str) -> None:
    """Tolerance: the model's RoPE tables are fp32, and errors of 1e-7 grow through four blocks."""
    config = tiny(name, **NO_YARN)
    model, (tokens, _) = build(config), samples(config)
    expected = torch.stack(plain_of(model).trunk(tokens.tolist()))
    torch.testing.assert_close(model.hidden(tokens[None])[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "mistake",
    [
        "half rotation",
        "latent norms like the others",
        "local layers global",
        "window one wider",
        "scale of the value width",
        "bias in the gates",
        "gates not normalised",
    ],
)
def test_the_plain_trunk_tells_mistakes_apart(tiny, build, mistake: str) -> None:
    config = tiny(**NO_YARN)
    model, (tokens, _) = build(config), samples(config)
    with torch.no_grad():
        wrong = torch.stack(plain_of(model, mistake).trunk(tokens.tolist()))
        assert (model.hidden(tokens[None])[0] - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["mla", "sdpa", "everything"])
def test_loss_and_gradients_equal_the_plain_ones(tiny, build, name: str, depth: int) -> None:
    config = tiny(name, **NO_YARN, mtp_depth=depth, mtp_loss_weight=0.7)
    model, sample = build(config), samples(config)
    plain = plain_of(model)
    expected = sum(plain.loss(tokens, 14) for tokens in sample.tolist())
    found = model.training_loss(sample, 14).total
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found.backward()
    expected.backward()
    for parameter_name, parameter in model.named_parameters():
        wanted = plain.weights[parameter_name].grad
        assert parameter.grad is not None, parameter_name
        # Experts that no token chose have no gradient in either.
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-4, atol=2e-6, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "mistake",
    [
        "embedding first",
        "embedding one early",
        "target one early",
        "raw trunk state",
        "trunk's norm",
        "local block",
        "divided by its own count",
        "sum over depths",
    ],
)
def test_the_plain_model_tells_mistakes_apart(tiny, build, mistake: str) -> None:
    config = tiny("mla_swa_mtp", mtp_depth=2, mtp_loss_weight=0.7)
    model, sample = build(config), samples(config)
    with torch.no_grad():
        wrong = sum(plain_of(model, mistake).loss(tokens, 14) for tokens in sample.tolist())
        found = model.training_loss(sample, 14).total
    assert abs(float(found - wrong)) > 1e-3


def test_depths_share_embedding_and_head(tiny, build) -> None:
    config = tiny("mla_swa_mtp", mtp_depth=2)
    model = build(config)
    assert sum(name.endswith(("embed.weight", "head.weight")) for name, _ in model.named_parameters()) == 2
    sample = samples(config)
    model.training_loss(sample, 14).total.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if n in ("embed.weight", "head.weight")}
    model.zero_grad()
    trunk_alone = torch.nn.functional.cross_entropy(model.logits(sample[:, :-1]).flatten(0, 1), sample[:, 1:].flatten())
    trunk_alone.backward()
    for name, grad in together.items():
        alone = model.get_parameter(name).grad
        assert (grad - alone).abs().max() > 1e-3, f"{name} learns from MTP too"


def test_mtp_leaves_the_trunks_values_alone(tiny, build) -> None:
    """Its weights do not enter logits, scores or the next-token loss."""
    config = tiny("mla_swa_mtp", mtp_depth=2)
    model, sample = build(config), samples(config)
    before = model.logits(sample), model.training_loss(sample, 14).next_token
    with torch.no_grad():
        for parameter in model.mtp.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model.logits(sample), before[0])
    assert torch.equal(model.training_loss(sample, 14).next_token, before[1])


def test_no_depth_sees_what_it_predicts(tiny, build) -> None:
    """Changing the sample's last token changes the last target of each depth and no input: gradients of the states that
    predict other tokens stay equal, so the loss changes by those terms alone."""
    config = tiny("mla_swa_mtp", mtp_depth=2, mtp_loss_weight=1.0)
    model, sample = build(config), samples(config, count=1)
    other = sample.clone()
    other[0, -1] = (other[0, -1] + 1) % config.vocab_size
    plain = plain_of(model)
    with torch.no_grad():
        states, expected = plain.trunk(sample[0, :-1].tolist()), 0.0
        for depth in range(3):
            if depth:
                states, _ = plain.mtp(states, sample[0].tolist(), depth)
            weight = 1.0 if depth == 0 else 0.5
            last = states[-1]
            expected += weight * float(plain.nll(last, int(other[0, -1])) - plain.nll(last, int(sample[0, -1]))) / 7
        found = model.training_loss(other, 7).total - model.training_loss(sample, 7).total
    assert float(found) == pytest.approx(expected, abs=1e-5)
