"""The language model: embedding, blocks, final norm, head, and the multi-token-prediction modules.

Shapes: B batch, S sequence, T = B·S tokens, D model width, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple, Self

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.block import Block
from nmoe.model.branches import Branches
from nmoe.model.cache import Cache
from nmoe.model.feed_forward import Experts, Router
from nmoe.model.layers import Embedding, Linear, RMSNorm, RotaryEmbedding
from nmoe.model.mtp import MtpModule
from nmoe.model.schema import ModelConfig
from nmoe.model.tensor_pieces import TensorPiece
from nmoe.rdep.transport import Transport
from torch import nn
from torch.utils.checkpoint import checkpoint

Role = Literal["embed", "norm", "router", "expert", "dense"]
"""What a parameter is, for optimizers: `embed` is embedding and head, `dense` every other matrix but the experts'."""


class TrainingLoss(NamedTuple):
    """The loss of a micro-batch, as its share of the global batch's mean."""

    total: torch.Tensor
    """What is differentiated: next-token loss, weighted MTP and balance losses."""
    next_token: torch.Tensor
    """Next-token loss alone, detached."""


_Told = tuple[torch.Tensor | None, torch.Tensor | None]
"""What a layer's router tells: balance loss and load."""


class Transformer(nn.Module):
    """A decoder-only transformer of DeepSeek-V3's shape. Build it with `Transformer.build`, which draws the weights."""

    def __init__(self, config: ModelConfig, ops: Ops, transport: Transport) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed = Embedding(config.vocab_size, config.dim)
        self.rope = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Block(config, i, ops, transport) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, ops)
        self.head = Linear(config.dim, config.vocab_size)
        self.mtp = nn.ModuleList(MtpModule(config, k, ops, transport) for k in range(1, config.mtp_depth + 1))

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        ops: Ops,
        transport: Transport,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int | None = None,
    ) -> Self:
        """A model with its parameters in `dtype` on `device` (routers in fp32 at least).

        Args:
            config: the shape.
            ops: the kernel tier.
            transport: how rows reach experts.
            device: where the parameters live; `meta` for shapes alone.
            dtype: of all parameters but the routers'.
            seed: draws the weights; None leaves them unset, to be loaded.
        """
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = cls(config, ops, transport)
        finally:
            torch.set_default_dtype(default)
        if seed is not None:
            model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices from N(0, init_std²), norms one. Each parameter has its own stream, by name: adding a layer changes
        no other layer's start. Of experts, all are drawn and this rank's kept: the start does not depend on the ranks.
        """
        experts = self._experts()
        for name, parameter in self.named_parameters():
            if parameter_role(name) == "norm":
                parameter.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "little"))
            std, of = self.config.init_std, experts.get(name)
            if of is None or of.n_experts == len(parameter):
                parameter.normal_(0.0, std, generator=generator)
                continue
            whole = parameter.new_empty(of.n_experts, *parameter.shape[1:]).normal_(0.0, std, generator=generator)
            parameter.copy_(whole[of.first : of.first + len(parameter)])

    def hidden(
        self,
        token_BS: torch.Tensor,
        cache: Cache | None = None,
        *,
        document_start_BS: torch.Tensor | None = None,
        branches: Branches | None = None,
    ) -> torch.Tensor:
        """States after the final norm, (B, S, D).

        Args:
            token_BS: int64 tokens.
            cache: the tokens continue what it holds, which positions count too.
            document_start_BS: int32, for each position the first position of its document, before which attention sees
                nothing; never decreasing along S, at most the position. None: a sample is one document. RoPE's
                positions stay those in the sample: scores depend on differences of positions alone, and within a
                document these are the same.
            branches: the rows are trees; with neither cache nor documents.
        """
        if branches is None:
            return self._trunk(token_BS, cache, document_start_BS)[0]
        assert cache is None, "nothing asks for both"
        assert document_start_BS is None, "nothing asks for both"
        # Ops turn by the place in a row, and each row has positions of its own: all tokens become one row.
        return self._trunk(token_BS.flatten()[None], None, None, branches=branches)[0].view(*token_BS.shape, -1)

    def _trunk(
        self,
        token_BS: torch.Tensor,
        cache: Cache | None,
        document_start_BS: torch.Tensor | None,
        recompute: Collection[int] = (),
        branches: Branches | None = None,
    ) -> tuple[torch.Tensor, list[_Told]]:
        if branches is None:
            rope = self.rope(0 if cache is None else cache.length, token_BS.shape[1], token_BS.device)
        else:
            rope = self.rope.at(branches.position_BS.flatten())
        x_BSD, delta_BSD, told = self.embed(token_BS), None, []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            if i in recompute and delta_BSD is not None:
                x_BSD, delta_BSD = x_BSD + delta_BSD, None  # the same sum, and one tensor to keep instead of two
            inputs = (x_BSD, delta_BSD, rope, layer_cache, document_start_BS, branches)
            x_BSD, out = _run(layer, i in recompute, *inputs)
            delta_BSD = out.out_BSD
            told.append((out.balance, out.load_E))
        return self.norm.after_adding(x_BSD, delta_BSD)[1], told

    def logits(
        self,
        token_BS: torch.Tensor,
        cache: Cache | None = None,
        *,
        document_start_BS: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Next-token logits (B, S, V), or (B, 1, V) of the last position. Documents as `hidden` has them."""
        state_BSD = self.hidden(token_BS, cache, document_start_BS=document_start_BS)
        return self.head(state_BSD[:, -1:] if last_only else state_BSD)

    def score(
        self, input_BS: torch.Tensor, target_BS: torch.Tensor, *, document_start_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of `-log p(target)` in nats over targets that are not -100; never holds T×V logits. Documents as `hidden`
        has them."""
        state_TD = self.hidden(input_BS, document_start_BS=document_start_BS).flatten(0, 1)
        return self.ops.linear_cross_entropy(state_TD, self.head.weight, target_BS.flatten())

    def training_loss(
        self,
        sample_BS1: torch.Tensor,
        n_tokens: int,
        *,
        document_start_BS: torch.Tensor | None = None,
        target_BS: torch.Tensor | None = None,
        n_targets: torch.Tensor | None = None,
        recompute: Collection[int] = (),
    ) -> TrainingLoss:
        """Loss of samples of S + 1 tokens, over `n_tokens`, the predicted tokens of the whole global batch.

        Depth k of MTP drops the last k positions; its loss is divided by the same count (equation 24), the depths'
        mean weighted by λ (equation 25). Balance losses are means over the sequences of the global batch. In training
        mode the routers' loads count every routed row.

        Args:
            sample_BS1: int64 tokens.
            n_tokens: divides the losses.
            document_start_BS: of the S input positions, as `hidden` has them; MTP's modules take those of their own
                positions (see `MtpModule.forward`).
            target_BS: int64, what to predict at each input position, -100 where nothing; None: the token that follows,
                also where that is a document's first and all that is seen is the document before it.
            n_targets: int64 scalar on the device, how many targets of the whole global batch are not -100: divides the
                cross-entropies then, in place of `n_tokens`.
            recompute: layers that keep their input alone and compute the rest again in the backward, for the same bits
                in less memory. MTP's modules are numbered on from the trunk's layers.
        """
        length = sample_BS1.shape[1] - 1
        input_BS = sample_BS1[:, :-1]
        target_BS = sample_BS1[:, 1:] if target_BS is None else target_BS
        divisor = n_tokens if n_targets is None else n_targets
        state_BSD, told = self._trunk(input_BS, None, document_start_BS, recompute)
        nll = self.ops.linear_cross_entropy(state_BSD.flatten(0, 1), self.head.weight, target_BS.flatten())
        total = nll / divisor
        for depth, module in enumerate(self.mtp, start=1):
            rope = self.rope(0, length - depth, sample_BS1.device)
            embedding_BSD = self.embed(input_BS[:, depth:])
            recomputed = self.config.n_layers + depth - 1 in recompute
            before_BSD = state_BSD[:, : length - depth]
            starts_BS = None if document_start_BS is None else document_start_BS[:, : length - depth]
            state_BSD, balance, load_E = _run(module, recomputed, before_BSD, embedding_BSD, rope, starts_BS)
            told.append((balance, load_E))
            loss = self.ops.linear_cross_entropy(
                state_BSD.flatten(0, 1), self.head.weight, target_BS[:, depth:].flatten()
            )
            total = total + loss * (self.config.mtp_loss_weight / self.config.mtp_depth / divisor)
        for balance, _ in told:
            if balance is not None:
                total = total + balance * (length / n_tokens)
        if self.training:
            loads = (load_E for _, load_E in told if load_E is not None)
            for (_, router), load_E in zip(self.routers(), loads, strict=True):
                router.load += load_E
        return TrainingLoss(total, (nll / divisor).detach())

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every router by the name of its block, in order."""
        for name, module in self.named_modules():
            if isinstance(module, Router):
                yield name.removesuffix(".ffn.router"), module

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that makes the model, by name: parameters and the routers' selection biases. Of experts, those
        of this rank."""
        return dict(self.state_dict())

    def pieces(self) -> list[TensorPiece]:
        """`state` as pieces of the whole model's tensors, in which experts stand by their global ids."""
        experts = self._experts()
        pieces = []
        for name, tensor in self.state().items():
            shape, start = tuple(tensor.shape), 0
            if name in experts:
                shape, start = (experts[name].n_experts, *shape[1:]), experts[name].first * tensor[0].numel()
            pieces.append(TensorPiece(name, shape, start, tensor))
        return pieces

    def _experts(self) -> dict[str, Experts]:
        """By the names of their parameters."""
        found = ((name, module) for name, module in self.named_modules() if isinstance(module, Experts))
        return {f"{name}.{parameter}": experts for name, experts in found for parameter in ("w13", "w2")}


def _run(layer: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """What `layer` gives. If it is to be recomputed, only its inputs stay: the backward calls it again, and so its
    forward must touch nothing but what it returns."""
    if not recompute:
        return layer(*inputs)
    # No layer draws random numbers: there is no state to restore, which a CUDA graph could not do.
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


def parameter_role(name: str) -> Role:
    """The role of the parameter of that name (as `Transformer.named_parameters` gives it)."""
    parts = name.split(".")
    if parts[0] in ("embed", "head"):
        return "embed"
    if "norm" in parts[-2]:
        return "norm"
    if parts[-2] == "router":
        return "router"
    return "expert" if parts[-2] == "experts" else "dense"
