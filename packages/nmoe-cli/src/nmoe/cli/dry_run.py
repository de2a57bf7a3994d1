"""What a run would be and need, told without a GPU: `n train --dry-run`."""

import os
from collections.abc import Sequence

from nmoe.cli.config import LoadedConfig
from nmoe.cli.console import print_line, print_summary
from nmoe.cli.toml_writer import dump_toml, toml_value
from nmoe.cli.units import format_bytes, format_count, format_flops
from nmoe.model.count import count_parameters, flops_per_token
from nmoe.train.memory import predict_memory
from nmoe.train.recompute import enough_layers, recompute_share, with_recomputed
from nmoe.train.schedule import decay_steps, schedule_mismatch
from nmoe.train.schema import TrainingConfig
from rich.console import Console


def print_dry_run(console: Console, loaded: LoadedConfig) -> None:
    """Prints the resolved configuration, the sizes of model and step, and a rank's memory against the device's."""
    config = loaded.config
    for line in dump_toml(loaded.resolved).splitlines():
        print_line(console, line)
    print_line(console, "")
    count = count_parameters(config.model)
    flops = flops_per_token(config.model, config.train.seq_len)
    need = predict_memory(config)
    rows = [
        ("files", " < ".join(str(source) for source in loaded.sources[::-1])),
        ("parameters", f"{format_count(count.total)} in all, {format_count(count.active)} active for a token"),
        ("compute", f"{format_flops(flops)} a token, forward and backward"),
        ("step", f"{config.tokens_per_step:,} tokens, {format_flops(flops * config.tokens_per_step)}"),
        ("run", f"{config.train.steps:,} steps, {format_count(config.train.steps * config.tokens_per_step)} tokens"),
        ("rates", _rates(config)),
        *([("  but", mismatch)] if (mismatch := schedule_mismatch(config)) else []),
        ("memory", f"that each rank needs, of {config.runtime.world_size}"),
        ("  parameters", format_bytes(need.parameters)),
        ("  gradients", format_bytes(need.gradients)),
        ("  optimizer", format_bytes(need.optimizer)),
        ("  activations", format_bytes(need.activations)),
        ("  workspace", format_bytes(need.workspace)),
        *([("  slabs", format_bytes(need.slabs))] if need.slabs else []),
        ("  in all", format_bytes(need.total)),
    ]
    if config.recomputed_layers:
        rows.append(("  recomputed", _recomputed(config, need.total)))
    for name, memory in device_memory(config.runtime.device, config.runtime.kernels, config.runtime.world_size):
        spare = memory - need.total
        verdict = f"{format_bytes(spare)} to spare" if spare >= 0 else f"too small by {format_bytes(-spare)}"
        rows.append((name, f"{format_bytes(memory)}: {verdict}"))
        if spare < 0:
            rows.append(("  remedy", _remedy(config, memory)))
    print_summary(console, "Dry run: nothing was written", rows)


def _rates(config: TrainingConfig) -> str:
    """When learning rates rise and fall."""
    decay, rise = decay_steps(config.schedule, config.tokens_per_step), config.schedule.warmup_steps
    full = f"full from step {max(rise, 1):,} on"
    return full if decay is None else f"{full}, falling from step {decay[0]:,} to {decay[1]:,}"


def _recomputed(config: TrainingConfig, need: int) -> str:
    """What the layers that are computed again save and cost."""
    saved = predict_memory(with_recomputed(config, ())).total - need
    return f"{_layers(config.recomputed_layers)}: {format_bytes(saved)} less, {_cost(config)}"


def _remedy(config: TrainingConfig, memory: int) -> str:
    """What to recompute on a device whose memory the need exceeds."""
    every = range(config.model.n_layers + config.model.mtp_depth)
    enough = enough_layers(config, memory)
    if enough is None:
        least = predict_memory(with_recomputed(config, every)).total
        return f'train.recompute_layers = "all" is not enough: {format_bytes(least)} in all'
    other = with_recomputed(config, enough)
    value = '"all"' if len(enough) == len(every) else toml_value(enough)
    return f"train.recompute_layers = {value}: {format_bytes(predict_memory(other).total)} in all, {_cost(other)}"


def _cost(config: TrainingConfig) -> str:
    return f"{recompute_share(config):.1%} more FLOPs a step"


def _layers(layers: Sequence[int]) -> str:
    """`layers 0 to 3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = (str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {', '.join(words)}"


def device_memory(device: str, kernels: str, n_ranks: int) -> list[tuple[str, int]]:
    """Name and bytes of the device at hand; without a GPU, for CUDA, of every device that the kernels are for, on so
    many ranks, and whose limits are known."""
    if device == "cpu":
        return [("this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    import torch
    from nmoe.kernels.arch import NATIVE_ARCHES, known_devices
    from nmoe.kernels.native.grouped_gemm_cuda import ARCHES as GROUPED_ARCHES

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return [(properties.name, properties.total_memory)]
    arches = GROUPED_ARCHES if n_ranks > 1 else NATIVE_ARCHES
    return [
        (name, limits.memory_bytes)
        for name, limits in known_devices().items()
        if kernels != "native" or limits.arch in arches
    ]
