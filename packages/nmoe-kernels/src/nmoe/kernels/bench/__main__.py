"""`python -m nmoe.kernels.bench COMMAND`. Exit code 0: done; 1: a measurement or check failed; 2: wrong arguments."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nmoe.kernels.bench.machine import command_line
from nmoe.kernels.bench.op_cases import OPS
from nmoe.kernels.bench.peers import LAYERS, PEERS
from nmoe.kernels.bench.problem import DEFAULT_SHAPES, NAMED_SHAPES, ROUTING_KINDS, RoutingKind, Shape, parse_shape
from nmoe.kernels.errors import KernelError, UnsupportedArchError

_SHAPE_HELP = f"T,D,F,E,K, or one of {', '.join(NAMED_SHAPES)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(typed)
    run: Callable[[argparse.Namespace, list[str]], int] = args.run
    try:
        return run(args, typed)
    except (KernelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nmoe.kernels.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    layer = commands.add_parser("moe-layer", help="one MoE layer beside its peers")
    _add_shapes(layer, DEFAULT_SHAPES)
    layer.add_argument("--peers", type=_peers, default=PEERS, help=f"out of {', '.join(PEERS)}; or none")
    _add_routings(layer, ["uniform"])
    layer.add_argument("--rounds", type=_count, default=3, help="turns that each layer takes (default: 3)")
    _add_output(layer)
    layer.add_argument("--peer-path", metavar="DIR", help="folder of SonicMoE's packages, for its process only")
    _add_timeout(layer)
    layer.set_defaults(run=_moe_layer)

    table = commands.add_parser("table", help="Markdown table of the results in JSON files")
    table.add_argument("files", type=Path, nargs="+", metavar="FILE")
    table.set_defaults(run=_table)

    tiles = commands.add_parser("tiles", help="each tile of each grouped product; lines for the table of tiles")
    _add_shapes(tiles, DEFAULT_SHAPES)
    _add_routings(tiles, ["uniform"])
    tiles.set_defaults(run=_tiles)

    cold = commands.add_parser("cold", help="the first forward and backward with an empty kernel cache")
    cold.add_argument("--shape", type=_shape, default=NAMED_SHAPES["moonlet"], help=_SHAPE_HELP + " (default: moonlet)")
    _add_output(cold)
    _add_timeout(cold)
    cold.set_defaults(run=_cold)

    bits = commands.add_parser("equal-bits", help="whether fresh processes give the same bits; exit code 1 if not")
    bits.add_argument("--shape", type=_shape, default=NAMED_SHAPES["moonlet"], help=_SHAPE_HELP + " (default: moonlet)")
    _add_routings(bits, ["uniform", "zipf"])
    bits.add_argument("--processes", type=_processes, default=10, help="one after another (default: 10)")
    _add_output(bits)
    _add_timeout(bits)
    bits.set_defaults(run=_equal_bits)

    accuracy = commands.add_parser(
        "accuracy", help="distance from float64 beside that of PyTorch's bf16 ops; exit code 1 if ours is above"
    )
    _add_output(accuracy)
    accuracy.set_defaults(run=_accuracy)

    ops = commands.add_parser(
        "ops", help="each hot op of a training step beside its bound; exit code 1 if one fails or is above its ratio"
    )
    ops.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="NAME", help=f"out of {', '.join(OPS)}")
    _add_output(ops)
    ops.set_defaults(run=_ops)

    worker = commands.add_parser("worker", help="one layer in this process; prints one JSON line")
    worker.add_argument("--task", choices=("time", "cold", "bits"), default="time")
    worker.add_argument("--layer", choices=tuple(LAYERS), default="nmoe")
    worker.add_argument("--shape", type=_shape, required=True, help=_SHAPE_HELP)
    _add_routings(worker, ["uniform"])
    worker.set_defaults(run=_worker)
    for command in commands.choices.values():
        command.allow_abbrev = False  # `command_line` knows by its whole name which option holds a folder
    return parser


def _add_shapes(parser: argparse.ArgumentParser, default: Sequence[Shape]) -> None:
    parser.add_argument("--shapes", type=_shape, nargs="+", default=list(default), help=_SHAPE_HELP)


def _add_routings(parser: argparse.ArgumentParser, default: list[RoutingKind]) -> None:
    parser.add_argument("--routing", type=_routings, default=default, help=f"out of {', '.join(ROUTING_KINDS)}")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds that a process may take (default: 420)")


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except KernelError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found '{text}': leave it out for the default")
    return int(text)


def _processes(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError("expected 2 processes or more, found 1: one alone shows nothing")
    return int(text)


def _peers(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(_names(text, PEERS))


def _routings(text: str) -> list[RoutingKind]:
    return _names(text, ROUTING_KINDS)


def _names(text: str, known: Sequence[Any]) -> list[Any]:
    names = text.split(",")
    if any(name not in known for name in names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, each once, found '{text}'")
    return names


def _moe_layer(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.moe_layer import compare, failed, process_runner

    if args.peer_path is not None and not Path(args.peer_path).is_dir():
        raise KernelError(f"expected a folder of packages for --peer-path, found '{args.peer_path}': unpack them first")
    _require_gpu()
    results = compare(
        args.shapes,
        ("nmoe", *args.peers),
        args.routing,
        args.rounds,
        run=process_runner(args.peer_path, args.timeout),
        command=command_line(typed),
        output=args.output,
    )
    for error in failed(results):
        print(f"error: nmoe not measured: {error}", file=sys.stderr)
    return 1 if failed(results) else 0


def _table(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench import op_report
    from nmoe.kernels.bench.report import markdown

    layers, tables = [], []
    for file in args.files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if "rates" in result:  # only ops measures these
                tables.append(op_report.markdown(result))
            else:
                markdown([result])
                layers.append(result)
        except (ValueError, KeyError, TypeError) as error:
            raise KernelError(
                f"expected results of moe-layer or of ops in '{file}', found {type(error).__name__}: {error}: write "
                "the file anew with --output"
            ) from error
    print("\n\n".join([*([markdown(layers)] if layers else []), *tables]))
    return 0


def _tiles(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.tiles import print_tiles

    _require_gpu()
    print_tiles(args.shapes, args.routing)
    return 0


def _cold(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.cold import print_cold

    _require_gpu()
    print_cold(args.shape, args.timeout, command=command_line(typed), output=args.output)
    return 0


def _equal_bits(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.equal_bits import print_equal_bits

    same = print_equal_bits(
        args.shape, args.routing, args.processes, args.timeout, command=command_line(typed), output=args.output
    )
    return 0 if same else 1


def _accuracy(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.accuracy import print_accuracy

    _require_gpu()
    return 0 if print_accuracy(command=command_line(typed), output=args.output) else 1


def _ops(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.ops import print_ops

    _require_gpu()
    return 0 if print_ops(args.ops, command=command_line(typed), output=args.output) else 1


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedArchError("expected a CUDA GPU, found none: run this on a machine with one")


def _worker(args: argparse.Namespace, typed: list[str]) -> int:
    from nmoe.kernels.bench.worker import run_worker

    return run_worker(args.task, args.layer, args.shape, args.routing)


if __name__ == "__main__":
    raise SystemExit(main())
