"""What a run would be and need, told without a GPU: `n train --dry-run`."""

import os

from nmoe.cli.config import LoadedConfig
from nmoe.cli.console import print_line, print_summary
from nmoe.cli.toml_writer import dump_toml
from nmoe.cli.units import format_bytes, format_count, format_flops
from nmoe.model.count import count_parameters, flops_per_token
from nmoe.train.memory import predict_memory
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
        ("memory", f"that each rank needs, of {config.runtime.world_size}"),
        ("  parameters", format_bytes(need.parameters)),
        ("  gradients", format_bytes(need.gradients)),
        ("  optimizer", format_bytes(need.optimizer)),
        ("  activations", format_bytes(need.activations)),
        ("  workspace", format_bytes(need.workspace)),
        ("  in all", format_bytes(need.total)),
    ]
    for name, memory in device_memory(config.runtime.device):
        spare = memory - need.total
        verdict = f"{format_bytes(spare)} to spare" if spare >= 0 else f"too small by {format_bytes(-spare)}"
        rows.append((name, f"{format_bytes(memory)}: {verdict}"))
    print_summary(console, "Dry run: nothing was written", rows)


def device_memory(device: str) -> list[tuple[str, int]]:
    """Name and bytes of the device at hand; without a GPU, for CUDA, of every device whose limits are known."""
    if device == "cpu":
        return [("this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    import torch
    from nmoe.kernels.arch import known_devices

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return [(properties.name, properties.total_memory)]
    return [(name, limits.memory_bytes) for name, limits in known_devices().items()]
