"""`n generate`: continues a prompt."""

from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.context import Injected
from nmoe.cli.options import DeviceName, KernelsName, ModelName, TokenizerName


def generate(
    run: ModelName,
    /,
    *,
    prompt: Annotated[str, Parameter(help="Text to continue; empty: from the start of a document.")],
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Parameter(help="Draw from the likeliest tokens of this probability in all.")] = 0.95,
    max_tokens: Annotated[int, Parameter(help="Stop after so many tokens.")] = 200,
    seed: Annotated[int, Parameter(help="The same seed draws the same text.")] = 0,
    tokenizer: TokenizerName = None,
    device: DeviceName = None,
    kernels: KernelsName = None,
    context: Injected,
) -> None:
    """Continue a prompt with a trained model; prompt and text go to standard output."""
    import codecs

    from nmoe.cli.errors import UsageError
    from nmoe.cli.open_model import open_model
    from nmoe.cli.tokenizer_name import model_tokenizer
    from nmoe.model.generation import Sampling
    from nmoe.model.generation import generate as generate_tokens

    if max_tokens < 1:
        raise UsageError(f"expected --max-tokens of at least 1, found {max_tokens}")
    sampling = Sampling(temperature, top_p, seed)
    opened = open_model(run, context, device, kernels)
    vocabulary = model_tokenizer(opened.folder, tokenizer)
    if vocabulary.n_vocab > opened.model.config.vocab_size:
        raise UsageError(
            f"expected a tokenizer of at most {opened.model.config.vocab_size} ids, found {vocabulary.name} with "
            f"{vocabulary.n_vocab}: give the one that the model was trained with"
        )
    ids = vocabulary.encode(prompt) or [vocabulary.eos_id]
    tokens = generate_tokens(
        opened.model,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        eos_id=vocabulary.eos_id,
        n_ids=vocabulary.n_vocab,
    )
    out = context.console.file
    out.write(prompt)
    # A character may span tokens: its bytes are held back until it is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        out.write(decoder.decode(vocabulary.decode_bytes([token])))
        out.flush()
    out.write(decoder.decode(b"", final=True) + "\n")
