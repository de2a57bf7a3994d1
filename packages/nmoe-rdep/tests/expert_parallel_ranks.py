"""One rank of test_expert_parallel.py. Usage: expert_parallel_ranks.py DEVICE CASE…"""

import hashlib
import random
import sys
import time

import pytest
import ranks
import torch
from nmoe.kernels.ops import select_ops
from nmoe.rdep.errors import CapacityError, PeerTimeoutError, RdepError
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import LocalTransport, open_transport

HIDDEN, TOP_K, EXPERTS = 32, 3, 8


class Setting:
    """The same numbers on every rank: tokens of all ranks, and the weights of all experts."""

    def __init__(self, world, on_gpu, most, *, tokens=None, skew=None, seed=0):
        self.world, self.on_gpu, self.most = world, on_gpu, most
        self.dim = dim = 2048 if most > 1024 else 64  # rows as wide as those that GPUs send in waves
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.ops = select_ops("native" if on_gpu else "reference", world.device)
        draw = torch.Generator().manual_seed(seed)
        self.tokens = tokens or [most - 7 * rank for rank in range(world.size)]

        def randn(*shape, scale=1.0):
            return (torch.randn(*shape, generator=draw) * scale).to(self.dtype).to(world.device)

        self.x = [randn(n, dim) for n in self.tokens]
        self.dout = [randn(n, dim) for n in self.tokens]
        self.logits = [torch.randn(n, EXPERTS, generator=draw).to(world.device) for n in self.tokens]
        if skew is not None:
            for logits in self.logits:
                logits[:, skew] += 100.0
        self.bias = torch.zeros(EXPERTS, device=world.device)
        self.w13 = randn(EXPERTS, 2, HIDDEN, dim, scale=dim**-0.5)
        self.w2 = randn(EXPERTS, dim, HIDDEN, scale=HIDDEN**-0.5)

    def run(self, layer, w13, w2, who):
        """Output, load and gradients of the tokens of ranks `who`, each at once."""
        w13, w2 = w13.clone().requires_grad_(), w2.clone().requires_grad_()
        x = torch.cat([self.x[rank] for rank in who]).requires_grad_()
        logits = torch.cat([self.logits[rank] for rank in who]).requires_grad_()
        routing = self.ops.route(logits, self.bias, top_k=TOP_K)
        # Something beside, which depends on x too: its gradient meets the experts', whichever comes first.
        out, load, doubled = layer(self.ops, x, routing, w13, w2, lambda: 2 * x)
        (out + doubled).backward(torch.cat([self.dout[rank] for rank in who]))
        return [out.detach(), load, x.grad, logits.grad, w13.grad, w2.grad]

    def of_one_rank(self):
        layer = LocalTransport().layer(self.dim, TOP_K, EXPERTS)
        return self.run(layer, self.w13, self.w2, range(self.world.size))

    def mine(self):
        e = EXPERTS // self.world.size
        return slice(self.world.rank * e, self.world.rank * e + e)


def open_(setting, **config):
    kind = "ipc" if setting.on_gpu else "shm"
    rdep = RdepConfig(transport=kind, **{"capacity_factor": 8.0, "timeout_s": 60.0, **config})
    return open_transport(rdep, setting.world, max_tokens=setting.most, dtype=setting.dtype)


def near(found, expected, what, on_gpu):
    assert found.shape == expected.shape, what
    if not found.numel():
        return
    # bf16: the owners' sums are rounded on their way, once more than one rank rounds.
    tolerance = 3e-2 if on_gpu else 2e-5
    bound = float(tolerance * expected.abs().float().amax().clamp_min(1e-6))
    error = float((found.float() - expected.float()).abs().amax())
    assert error <= bound, f"{what}: {error} above {bound}"


def digest(tensors):
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return state.digest()


def equals_one_rank(world, on_gpu, most):
    """Even and skewed routing, a rank without tokens, and none with any: outputs and gradients of one rank's layer."""
    cases = [
        Setting(world, on_gpu, most),
        Setting(world, on_gpu, most, skew=EXPERTS - 1, seed=1),
        Setting(world, on_gpu, most, tokens=[0] + [5 + rank for rank in range(1, world.size)], seed=2),
        Setting(world, on_gpu, most, tokens=[most] + [0] * (world.size - 1), seed=3),
        Setting(world, on_gpu, most, tokens=[0] * world.size, seed=4),
    ]
    transport = open_(cases[0])
    layers = [transport.layer(cases[0].dim, TOP_K, EXPERTS) for _ in range(2)]
    assert transport.n_local(EXPERTS) == EXPERTS // world.size
    for number, setting in enumerate(cases):
        expected = setting.of_one_rank() if sum(setting.tokens) else None
        for layer in layers:
            found = setting.run(layer, setting.w13[setting.mine()], setting.w2[setting.mine()], [world.rank])
            start = sum(setting.tokens[: world.rank])
            own = slice(start, start + setting.tokens[world.rank])
            if expected is None:
                assert found[0].shape == (0, setting.dim)
                assert not any(bool(weight_grad.any()) for weight_grad in found[4:])
                continue
            for name, index in (("out", 0), ("dx", 2), ("dlogits", 3)):
                near(found[index], expected[index][own], f"case {number}: {name}", on_gpu)
            for name, index in (("dw13", 4), ("dw2", 5)):
                near(found[index], expected[index][setting.mine()], f"case {number}: {name}", on_gpu)
            load = found[1].clone()
            world.sum_(load)
            assert torch.equal(load.cpu(), expected[1].cpu()), "rows are conserved"
            assert int(found[1].sum()) == setting.tokens[world.rank] * TOP_K
            with torch.no_grad():  # an evaluation between: the slab is used again, and nothing is kept
                again = layer(
                    setting.ops,
                    setting.x[world.rank],
                    setting.ops.route(setting.logits[world.rank], setting.bias, top_k=TOP_K),
                    setting.w13[setting.mine()],
                    setting.w2[setting.mine()],
                    lambda: None,
                )[0]
            assert torch.equal(again, found[0]), "the same bits without gradients"
    transport.faults.check()
    transport.close()


def same_bits(world, on_gpu, most, launches=10):
    """With delays drawn for each rank anew, every launch gives the same bits; on GPUs a graph's too."""
    setting = Setting(world, on_gpu, most)
    transport = open_(setting)
    layer = transport.layer(setting.dim, TOP_K, EXPERTS)
    delays = random.Random(world.rank)
    digests = set()

    def launch():
        return setting.run(layer, setting.w13[setting.mine()], setting.w2[setting.mine()], [world.rank])

    for _ in range(launches):
        time.sleep(delays.random() * 0.02)
        if on_gpu:
            torch.cuda._sleep(int(delays.random() * 5e6))
        digests.add(digest(launch()))
    assert len(digests) == 1
    if on_gpu:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            launch()
            torch.cuda.synchronize()
            world.barrier()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                found = launch()
            for _ in range(launches):
                torch.cuda._sleep(int(delays.random() * 5e6))
                for tensor in found:
                    tensor.fill_(0)
                graph.replay()
                torch.cuda.synchronize()
                digests.add(digest(found))
        assert len(digests) == 1, "graph and eager: the same bits"
    transport.faults.check()
    world.barrier()
    transport.close()


def stress(world, on_gpu, most, launches):
    """Many exchanges of random sizes with random delays: each output is the gated sum of what its experts give."""
    setting = Setting(world, on_gpu, most)
    transport = open_(setting)
    layer = transport.layer(setting.dim, TOP_K, EXPERTS)
    sizes, delays = random.Random(7), random.Random(world.rank)
    local = LocalTransport().layer(setting.dim, TOP_K, EXPERTS)
    w13, w2 = setting.w13[setting.mine()], setting.w2[setting.mine()]
    for number in range(launches):
        tokens = [sizes.randint(0, most) for _ in range(world.size)][world.rank]
        rows = torch.randint(0, max(1, setting.tokens[world.rank]), (tokens,), device=world.device)
        x, logits = setting.x[world.rank][rows], setting.logits[world.rank][rows]
        routing = setting.ops.route(logits, setting.bias, top_k=TOP_K)
        if delays.random() < 0.1:
            time.sleep(delays.random() * 0.005)
        if on_gpu and delays.random() < 0.3:
            torch.cuda._sleep(int(delays.random() * 2e5))
        with torch.no_grad():
            found = layer(setting.ops, x, routing, w13, w2, lambda: None)[0]
            if number % 10 == 0:
                expected = local(setting.ops, x, routing, setting.w13, setting.w2, lambda: None)[0]
                near(found, expected, f"exchange {number}", on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    transport.faults.check()
    world.barrier()
    transport.close()


def overflow(world, on_gpu, most):
    """All rows to one rank: that rank's fault, with a factor that is then enough."""
    setting = Setting(world, on_gpu, most, tokens=[most] * world.size, skew=0)
    setting.logits = [logits.clone() for logits in setting.logits]
    for logits in setting.logits:
        logits[:, : EXPERTS // world.size] += 50.0
    transport = open_(setting, capacity_factor=1.0)
    layer = transport.layer(setting.dim, TOP_K, EXPERTS)
    arguments = (setting.w13[setting.mine()], setting.w2[setting.mine()], [world.rank])
    setting.run(layer, *arguments)
    if on_gpu:
        torch.cuda.synchronize()
    factor = 0.0
    try:
        transport.faults.check()
        healthy = 1
    except CapacityError as error:
        healthy, factor = 0, error.needed_factor
    assert healthy == (world.rank > 0)
    assert int(transport.faults.healthy) == healthy
    factor = max(float(value) for value in world.share("factor", repr(factor).encode()))
    assert factor > 1.0
    transport.close()
    enough = open_(setting, capacity_factor=factor)
    setting.run(enough.layer(setting.dim, TOP_K, EXPERTS), *arguments)
    if on_gpu:
        torch.cuda.synchronize()
    enough.faults.check()
    world.barrier()
    enough.close()


def refusals(world, on_gpu, most):
    """What the layer was not made for is refused before anything is sent; so is a backward whose tokens are gone."""
    setting = Setting(world, on_gpu, most, tokens=[7] * world.size)
    transport = open_(setting)
    layer = transport.layer(setting.dim, TOP_K, EXPERTS)
    routing = setting.ops.route(setting.logits[world.rank], setting.bias, top_k=TOP_K)
    x, w13, w2 = setting.x[world.rank], setting.w13[setting.mine()], setting.w2[setting.mine()]
    more = setting.ops.route(torch.zeros(most + 1, EXPERTS, device=world.device), setting.bias, top_k=TOP_K)
    for arguments, told in (
        ((x.double(), routing, w13, w2), "found .* of torch.float64"),
        ((x[:, :-8], routing, w13, w2), rf"tokens \(T, {setting.dim}\)"),
        ((x[:5], routing, w13, w2), rf"experts \(5, {TOP_K}\)"),
        ((x.new_zeros(most + 1, setting.dim), more, w13, w2), f"at most {most} tokens"),
        ((x, routing, setting.w13.repeat(2, 1, 1, 1), w2), "contiguous w13"),
        ((x, routing, w13, w2.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous w2"),
    ):
        with pytest.raises(RdepError, match=told):
            layer(setting.ops, *arguments, lambda: None)
    out = layer(setting.ops, x, routing, w13.clone().requires_grad_(), w2, lambda: None)[0]
    layer(setting.ops, x, routing, w13, w2, lambda: None)
    with pytest.raises(RdepError, match="last call, number 2, found that of call 1"):
        out.sum().backward()
    with pytest.raises(RdepError, match=r"divide among .* found 7"):
        transport.n_local(7)
    transport.faults.check()
    world.barrier()
    transport.close()


def dead(world, on_gpu, most):
    """The last rank does not come: the others name it and its phase, and do not hang."""
    setting = Setting(world, on_gpu, most)
    transport = open_(setting, timeout_s=1.0)
    layer = transport.layer(setting.dim, TOP_K, EXPERTS)
    world.barrier()
    if world.rank == world.size - 1:
        time.sleep(3.0)
        return

    def launch():
        setting.run(layer, setting.w13[setting.mine()], setting.w2[setting.mine()], [world.rank])
        torch.cuda.synchronize()  # CPUs have raised by now
        transport.faults.check()

    begun = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        launch()
    assert (caught.value.rank, caught.value.phase) == (world.size - 1, "dispatch")
    assert 0.9 < time.monotonic() - begun < 10.0


CASES = {"equals": equals_one_rank, "bits": same_bits, "overflow": overflow, "refusals": refusals, "dead": dead}


def main():
    device, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    world = ranks.join(device)
    for case in cases:
        name, _, most = case.partition(":")  # of each rank's tokens
        arguments = (world, device == "cuda", int(most or 96))
        if name.startswith("stress"):
            stress(*arguments, int(name.removeprefix("stress")))
        else:
            CASES[name](*arguments)
    world.close()


if __name__ == "__main__":
    main()
