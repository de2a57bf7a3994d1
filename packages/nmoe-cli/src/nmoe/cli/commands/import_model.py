"""`n import`: a Hugging Face folder as a model of ours."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.context import Injected


def import_model(
    folder: Annotated[Path, Parameter(help="A Hugging Face folder in the DeepSeek-V3 format.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder to make.")],
    tokenizer: Annotated[
        str | None,
        Parameter(
            help="byte, gpt2, o200k_harmony or a .tiktoken file: the model's, recorded with it; of what n export made, "
            "the one that it was exported with if left out."
        ),
    ] = None,
    context: Injected,
) -> None:
    """Read a Hugging Face folder, so that --from, eval, generate and export can use it."""
    import shlex

    from nmoe.cli.console import print_summary
    from nmoe.cli.context_length import context_document
    from nmoe.cli.tokenizer_name import imported_document
    from nmoe.cli.toml_writer import dump_toml, toml_value
    from nmoe.cli.units import format_count
    from nmoe.model.checkpoint import write_folder
    from nmoe.model.count import count_parameters
    from nmoe.model.hf import import_hf, read_context_length
    from nmoe.model.weights import DOCUMENT, PREFIX, config_document

    known = imported_document(folder, tokenizer)
    config, tensors = import_hf(folder)
    length = read_context_length(folder)
    documents = {DOCUMENT: config_document(config), **known, **({} if length is None else context_document(length))}
    write_folder(output, {PREFIX + name: tensor for name, tensor in tensors.items()}, documents)
    count = count_parameters(config)
    section = output / "model.toml"
    section.write_text(dump_toml({"model": config_document(config)}), encoding="utf-8")
    rows = [
        ("from", str(folder)),
        *([("context", f"{length} tokens")] if length is not None else []),
        ("tokenizer", known["tokenizer"]["name"] if known else "not known"),
        ("parameters", f"{format_count(count.total)} in all, {format_count(count.active)} active for a token"),
        ("[model] section", str(section)),
    ]
    name = shlex.quote(str(output))
    n, base = context.command, toml_value(section.resolve())
    steps = [
        f'{n} generate {name} --prompt "The"' + ("" if known else " --tokenizer NAME"),
        f"{n} train CONFIG --from {name}, where CONFIG begins with: base = {base}",
    ]
    print_summary(context.console, f"Imported to {output}", rows, steps)
