"""`n export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from nmoe.cli.context import Injected
from nmoe.cli.options import ModelName, TokenizerName


def export(
    run: ModelName,
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder to make.")],
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, Parameter(help="Of the weights; as they are saved if left out.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None, Parameter(help="Context length to state; the run's, or an imported model's own, if left out.")
    ] = None,
    tokenizer: TokenizerName = None,
    context: Injected,
) -> None:
    """Write weights, config.json and tokenizer.json in the released DeepSeek-V3 format."""
    from nmoe.cli.config import load_config
    from nmoe.cli.console import print_summary
    from nmoe.cli.context_length import context_length
    from nmoe.cli.errors import UsageError
    from nmoe.cli.locate import locate_model
    from nmoe.cli.tokenizer_name import exported_files, model_tokenizer, tokenizer_name
    from nmoe.model.hf import export_hf
    from nmoe.model.weights import PREFIX, read_config
    from nmoe.train.checkpointer import load
    from nmoe.train.loop import DTYPES

    if max_position_embeddings is not None and max_position_embeddings < 1:
        raise UsageError(f"--max-position-embeddings: expected 1 or more, found {max_position_embeddings}")
    located = locate_model(run, context.data_root)
    folder = load(located.folder)
    config, tensors = read_config(folder), folder.tensors(PREFIX)
    vocabulary = model_tokenizer(folder, tokenizer)
    length = max_position_embeddings
    if length is None:
        trained = None if located.run is None else load_config(located.run.config, environ=context.environ).config
        length = context_length(folder, trained)
    if length is None:
        raise UsageError(f"{run} is no run and names no context length: add --max-position-embeddings")
    saved = tensors["embed.weight"].dtype
    export_hf(
        config,
        tensors,
        output,
        dtype=DTYPES[dtype] if dtype else saved,
        eos_id=vocabulary.eos_id,
        max_position_embeddings=length,
        extra_files=exported_files(tokenizer_name(folder, tokenizer), vocabulary, length),
    )
    rows = [("from", str(located.folder)), ("context", f"{length} tokens"), ("tokenizer", vocabulary.name)]
    command = f"python -c \"from transformers import pipeline; print(pipeline('text-generation', '{output}')('The'))\""
    print_summary(context.console, f"Exported to {output}", rows, [command])
