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
        int | None, Parameter(help="Context length to state; the run's sequence length if left out.")
    ] = None,
    tokenizer: TokenizerName = None,
    context: Injected,
) -> None:
    """Write weights, config.json and tokenizer.json in the released DeepSeek-V3 format."""
    from nmoe.cli.config import load_config
    from nmoe.cli.console import print_summary
    from nmoe.cli.errors import UsageError
    from nmoe.cli.locate import locate_model
    from nmoe.cli.tokenizer_name import model_tokenizer
    from nmoe.data.tokenizers import tokenizer_config, tokenizer_json
    from nmoe.model.hf import export_hf
    from nmoe.model.weights import PREFIX, read_config
    from nmoe.train.checkpointer import load
    from nmoe.train.loop import DTYPES

    located = locate_model(run, context.data_root)
    folder = load(located.folder)
    config, tensors = read_config(folder), folder.tensors(PREFIX)
    vocabulary = model_tokenizer(folder, tokenizer)
    length = max_position_embeddings
    if length is None and located.run is not None:
        length = load_config(located.run.config, environ=context.environ).config.train.seq_len
        if config.yarn is not None:
            length = max(length, int(config.yarn.original_seq_len * config.yarn.factor))
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
        extra_files={
            "tokenizer.json": tokenizer_json(vocabulary),
            "tokenizer_config.json": tokenizer_config(vocabulary, length),
        },
    )
    rows = [("from", str(located.folder)), ("context", f"{length} tokens"), ("tokenizer", vocabulary.name)]
    command = f"python -c \"from transformers import pipeline; print(pipeline('text-generation', '{output}')('The'))\""
    print_summary(context.console, f"Exported to {output}", rows, [command])
