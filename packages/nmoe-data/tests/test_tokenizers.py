import base64
import inspect
import json
import random
import re

import numpy as np
import pytest
import tokenizers as hf
from nmoe.data.corpus import pydoc_documents
from nmoe.data.errors import (
    TokenizerFileError,
    TokenizerUnavailableError,
    TokenRangeError,
    UnknownTokenizerError,
)
from nmoe.data.tokenizers import BpeTokenizer, ByteTokenizer, load_tokenizer, to_utf8, tokenizer_config, tokenizer_json
from nmoe.data.vocabulary import GPT2_PATTERN, O200K_PATTERN, RELEASED_PATTERNS, Vocabulary

AWKWARD = [
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "tabs\tand\r\nreturns\r\r\n\n\n   mixed \t ",
    "don't DON'T we'Ll I'M 'sup 's",
    "snake_case CamelCase HTTPServer x=1;y=2 /usr/bin//",
    "1234567890 3.14159 1e-5 ٣٤٥",
    "naïve café Ünïcödé ŻÓŁW żółw z\u0301olw",
    "中文字符，日本語のテキスト。한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 flags 🇵🇱",
    "\u00a0non-breaking\u2003em\u3000ideographic\u0085next\u2028line",
    "\u200bzero\u200dwidth\ufeffmark",
    "<|endoftext|> <|start|>user<|end|>",
    "\x00\x01\x7f control",
    "a" * 1000 + " " * 1000 + "\n" * 100 + "x",
    "a b  c   d    e     f",
    "zz zzz zzzz azzz azzzz zzzzzzzz",
]


@pytest.fixture(params=["byte", "made_up"])
def tokenizer(request, tiktoken_file):
    return load_tokenizer("byte" if request.param == "byte" else str(tiktoken_file))


def random_texts(count, seed=0):
    draw = random.Random(seed)
    alphabets = ["ab \n", " \t\r\n", "aAbB'sStT 19.,/", "żółw ßſK中é\u0301🙂 "]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.randrange(60))) for _ in range(count)]


def check_round_trip(tokenizer, texts):
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
        assert tokenizer.eos_id not in ids


def check_export(tokenizer, texts):
    exported = hf.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    specials = tokenizer.vocabulary.specials
    assert exported.get_vocab_size() == tokenizer.n_vocab
    assert exported.token_to_id("<|endoftext|>") == tokenizer.eos_id
    for text in texts:
        # The export reads special tokens from text, ours on purpose does not.
        if not any(special in text for special in specials):
            ids = tokenizer.encode(text)
            assert exported.encode(text).ids == ids, repr(text)
            assert exported.decode(ids) == text


def test_round_trip(tokenizer):
    check_round_trip(tokenizer, AWKWARD + random_texts(300))


def test_round_trip_of_released(released):
    check_round_trip(released, AWKWARD + random_texts(300))


def test_export_gives_the_same_ids(tokenizer):
    check_export(tokenizer, AWKWARD + random_texts(1000))


def test_export_of_released_gives_the_same_ids(released):
    check_export(released, AWKWARD + random_texts(1000))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda content: content["model"].update(merges=content["model"]["merges"][:-50]),
        lambda content: content["model"].update(merges=content["model"]["merges"][::-1]),
        lambda content: content["model"].update(ignore_merges=False),
        lambda content: content.update(pre_tokenizer=content["pre_tokenizer"]["pretokenizers"][1]),
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    ],
)
def test_export_comparison_notices_mistakes(tiktoken_file, mistake):
    tokenizer = load_tokenizer(str(tiktoken_file))
    content = tokenizer_json(tokenizer)
    mistake(content)
    text = "".join(pydoc_documents())[:20_000] + "\nżółw"
    assert hf.Tokenizer.from_str(json.dumps(content)).encode(text).ids != tokenizer.encode(text)


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eos_id) == ("byte", 257, 256)
    assert tokenizer.encode("aé") == [0x61, 0xC3, 0xA9]
    assert tokenizer_json(tokenizer)["model"]["merges"] == []


def test_released_sizes(released):
    sizes = {"gpt2": (50257, 50256), "o200k_harmony": (201088, 199999)}
    assert (released.n_vocab, released.eos_id) == sizes[released.name]
    known = {"gpt2": ("hello world", [31373, 995]), "o200k_harmony": ("hello world", [24912, 2375])}
    text, ids = known[released.name]
    assert released.encode(text) == ids
    assert released.vocabulary.pattern == RELEASED_PATTERNS[released.name]


def test_patterns_split_as_tiktoken_does(released):
    """We keep the patterns as published; tiktoken runs rewritten ones, which must mean the same."""
    import tiktoken

    theirs = tiktoken.get_encoding(released.name)
    for text in AWKWARD + random_texts(2000, seed=1):
        assert released.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize(
    ("pattern", "text", "pieces"),
    [
        (GPT2_PATTERN, "I've we'll 1234 a_b!  end ", "I|'ve| we|'ll| 1234| a|_|b|!| | end| "),
        (GPT2_PATTERN, "don'T\n\n  x", "don|'|T|\n\n | x"),
        (O200K_PATTERN, "I've we'LL 1234 a_b!\n  end ", "I've| we'LL| |123|4| a|_b|!\n| | end| "),
        (O200K_PATTERN, "HTTPServer \r\n\n\tx/y", "HTTPServer| \r\n\n|\tx|/y"),
    ],
)
def test_patterns_split_as_published(pattern, text, pieces):
    split = hf.pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces.split("|")


def test_an_id_with_two_names_is_exported_under_the_first(made_up_ranks):
    n = len(made_up_ranks)
    specials = {"<|endoftext|>": n, "<|endofprompt|>": n + 1, "<|reserved|>": n + 1, "<|last|>": n + 2}
    tokenizer = BpeTokenizer("two_names", Vocabulary(made_up_ranks, specials, O200K_PATTERN))
    added = tokenizer_json(tokenizer)["added_tokens"]
    assert [(token["id"], token["content"]) for token in added] == [
        (n, "<|endoftext|>"),
        (n + 1, "<|endofprompt|>"),
        (n + 2, "<|last|>"),
    ]
    check_export(tokenizer, AWKWARD)


def test_special_tokens_are_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")


def test_specials_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode_bytes([tokenizer.eos_id, *ids, tokenizer.eos_id]) == b"ab"


def test_broken_utf8_decodes_with_replacement(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é")[:1] if tokenizer.name == "byte" else [0xC3]) == "\ufffd"


def test_lone_surrogates_become_replacement_characters(tokenizer):
    text = "a\ud800b \ud83d\ude00"
    assert to_utf8(text).decode() == "a\ufffdb 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb 😀"
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("wrong", [-1, "n_vocab", 2**40])
def test_foreign_ids_are_refused(tokenizer, wrong):
    wrong = tokenizer.n_vocab if wrong == "n_vocab" else wrong
    with pytest.raises(TokenRangeError, match=str(wrong)):
        tokenizer.decode([1, wrong, 2])


def test_endless_white_space_is_encoded(tokenizer):
    """tiktoken's own regex panics on such runs."""
    text = "x\n" + " " * 1_000_000 + "y" + "\n" * 500_000 + "z"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_fingerprint_follows_content_not_name(tiktoken_file, made_up_ranks, tmp_path):
    copy = tmp_path / "other_name.tiktoken"
    copy.write_bytes(tiktoken_file.read_bytes())
    first, second = load_tokenizer(str(tiktoken_file)), load_tokenizer(str(copy))
    assert first.fingerprint == second.fingerprint
    assert first.name == f"made_up-{first.fingerprint[:8]}"

    base = first.vocabulary
    tokens = list(base.ranks)
    swapped = {**base.ranks, tokens[-1]: base.ranks[tokens[-2]], tokens[-2]: base.ranks[tokens[-1]]}
    others = [
        Vocabulary(swapped, base.specials, base.pattern),
        Vocabulary(base.ranks, {"<|endoftext|>": base.eos_id + 1}, base.pattern),
        Vocabulary(base.ranks, {**base.specials, "<|pad|>": base.eos_id + 1}, base.pattern),
        Vocabulary(base.ranks, base.specials, GPT2_PATTERN),
        Vocabulary({**base.ranks, tokens[-1]: len(tokens)}, {"<|endoftext|>": base.eos_id}, base.pattern),
    ]
    assert base.pattern == O200K_PATTERN
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_eos_comes_after_the_last_rank(tiktoken_file, made_up_ranks):
    tokenizer = load_tokenizer(str(tiktoken_file))
    assert tokenizer.eos_id == len(made_up_ranks)
    assert tokenizer.n_vocab == len(made_up_ranks) + 1


def test_a_word_that_merging_cannot_reach_is_found_whole(tiktoken_file, made_up_ranks):
    tokenizer = load_tokenizer(str(tiktoken_file))
    assert tokenizer.encode("żółw") == [made_up_ranks["żółw".encode()]]
    assert len(tokenizer.encode("żółwi")) > 2
    check_export(tokenizer, ["żółw", "żółwi", " żółw", "żółw żółw"])


def line(token, rank):
    return base64.b64encode(token) + b" " + str(rank).encode()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda lines: [*lines[:9], b"no base64! 9", *lines[10:]], ":10"),
        (lambda lines: [*lines[:9], lines[9].split()[0], *lines[10:]], ":10"),
        (lambda lines: [*lines, line(b"\x00", 256)], ":257"),
        (lambda lines: [*lines[:-1], line(b"ab", 255)], "byte 0xff"),
        (lambda lines: [*lines, line(b"ab", 300)], "ranks 0 to 256"),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, spoil, names):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(spoil([line(bytes([value]), value) for value in range(256)])))
    with pytest.raises(TokenizerFileError) as caught:
        load_tokenizer(str(path))
    assert "bad.tiktoken" in str(caught.value)
    assert names in str(caught.value)


def test_missing_file_and_unknown_name():
    with pytest.raises(TokenizerFileError, match=r"nowhere\.tiktoken"):
        load_tokenizer("nowhere.tiktoken")
    with pytest.raises(UnknownTokenizerError, match="o200k_harmony"):
        load_tokenizer("gpt-2")


@pytest.mark.parametrize("name", ["gpt2", "o200k_harmony"])
def test_no_cache_and_no_network_is_said_with_what_to_fetch(name, tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken_ext.openai_public

    asked = []

    def unreachable(path):
        asked.append(path)
        raise ConnectionError("no route to host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    with pytest.raises(TokenizerUnavailableError, match="TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer(name)
    files = re.findall(r"(https:\S+) as (\w+)", caught.value.remedy)
    assert files[0][0] == asked[0]
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: path.encode())
    for address, kept_as in files:  # by the cache itself
        assert address in inspect.getsource(tiktoken_ext.openai_public)
        tiktoken.load.read_file_cached(address)
        assert (tmp_path / kept_as).read_text() == address


def test_config_names_eos():
    config = tokenizer_config(ByteTokenizer(), model_max_length=4096)
    assert config["eos_token"] == "<|endoftext|>"
    assert config["model_max_length"] == 4096
    assert "model_max_length" not in tokenizer_config(ByteTokenizer())
