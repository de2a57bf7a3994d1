"""Models in Hugging Face's DeepSeek-V3 format: `config.json` and safetensors under the released names.

Both directions stream: beside the model itself, a few tensors at a time are in memory.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nmoe.model.checkpoint import clean_leftovers, leftover_path
from nmoe.model.errors import (
    DiskSpaceError,
    FolderExistsError,
    ForeignModelError,
    TensorMismatchError,
    UnsupportedByFormatError,
)
from nmoe.model.folder_json import encode_document
from nmoe.model.hf_config import model_config, released_config
from nmoe.model.hf_weights import Part, hollow_shapes, is_mtp, released_parts, state_shapes
from nmoe.model.schema import ModelConfig
from nmoe.model.tensor_file import TensorFile, plan_files, run_parallel, write_bytes, write_tensors
from safetensors import SafetensorError, safe_open

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WRITTEN = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_READ = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def export_hf(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    output: Path,
    *,
    dtype: torch.dtype,
    eos_id: int,
    max_position_embeddings: int,
    extra_files: Mapping[str, Any],
    max_file_bytes: int = 5 << 30,
) -> None:
    """Writes a folder that `transformers` (`DeepseekV3ForCausalLM`) and every reader of the released format loads.

    Training state stays behind; keys of `[model]` that only training reads go into a table `nmoe` of `config.json`.

    Args:
        config: the model.
        tensors: `Transformer.state()`: parameters and the routers' selection biases, of any float dtype, on any device.
        output: the folder; written under a temporary name and renamed.
        dtype: float32 or bfloat16, of all weights; selection biases are always fp32.
        eos_id: the token that ends a text.
        max_position_embeddings: positions that the model serves, YaRN's extension included.
        extra_files: JSON values by file name, such as `tokenizer.json`.
        max_file_bytes: bytes of tensors after which a new safetensors file begins.

    Raises:
        UnsupportedByFormatError: the format cannot express the model; all keys in the way are named.
        TensorMismatchError: `tensors` are not those of `config`.
        FolderExistsError: there is something at `output`.
        InvalidEntryError: a file name of `extra_files` is none that ends in `.json`, or its value is no JSON.
        DiskSpaceError: the disk has no room, seen before or while writing; what was written is removed.
    """
    if dtype not in _WRITTEN:
        raise UnsupportedByFormatError({"dtype": f"= {dtype} (expected one of {', '.join(map(str, _WRITTEN))})"})
    document = released_config(
        config, torch_dtype=_WRITTEN[dtype], eos_id=eos_id, max_position_embeddings=max_position_embeddings
    )
    _check_tensors(config, tensors)
    source = _ReleasedTensors(config, tensors, dtype)
    outline = source.outline()
    plans = _name_files(plan_files(outline, max_file_bytes))
    documents = {
        "config": document,
        "generation_config": {"bos_token_id": None, "eos_token_id": eos_id},
        **{name.removesuffix(".json"): value for name, value in extra_files.items()},
    }
    if len(plans) > 1:
        documents[_INDEX.removesuffix(".json")] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in outline.values())},
            "weight_map": {name: plan.name for plan in plans for name in plan.members},
        }
    texts = {f"{name}.json": encode_document(name, value) for name, value in documents.items()}
    _publish(output, plans, source, texts)


def import_hf(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Reads a folder of Hugging Face's DeepSeek-V3 format, as released or as `transformers` saves it.

    The tensors keep their dtype (float32, bfloat16 or float16). Those that are laid out as in the file are private
    mappings of it: pages are read when touched. A folder without MTP modules gives a model without, whatever its config
    says.

    Returns:
        The config, and the tensors of `Transformer.state()` by name, on the CPU.

    Raises:
        ForeignModelError: files, config keys or tensors that give no model that nmoe computes exactly; all are named.
    """
    config, problems = model_config(_read_json(folder, "config.json"))
    if config is None:
        raise ForeignModelError(folder, problems)
    with ExitStack() as stack:
        sources = _open_tensors(folder, stack)
        if not any(is_mtp(name, config) for name in sources):
            config = config.model_copy(update={"mtp_depth": 0})
        parts = released_parts(config)
        problems = _tensor_problems(config, parts, sources)
        if problems:
            raise ForeignModelError(folder, problems)
        tensors = _assemble(state_shapes(config), parts, sources)
        copies = {name: part.ours for name, part in parts.items() if part.is_copy and name in sources}
        differing = [
            f"{name}, which differs from the trunk's, where nmoe's MTP modules share it"
            for name, ours in copies.items()
            if not torch.equal(sources[name].get_tensor(name), tensors[ours])
        ]
    if differing:
        raise ForeignModelError(folder, differing)
    return config, tensors


def read_context_length(folder: Path) -> int | None:
    """Positions that a folder of that format says its model serves, YaRN's extension included; None where it does not.

    Raises:
        ForeignModelError: there is no readable `config.json`.
    """
    config = _read_json(folder, "config.json")
    length = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return length if type(length) is int and length > 0 else None


class _ReleasedTensors(Mapping[str, torch.Tensor]):
    """The released tensors of a model, each made when it is asked for."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._parts, self._hollow = released_parts(config), hollow_shapes(config)
        self._tensors, self._dtype = tensors, dtype

    def outline(self) -> dict[str, torch.Tensor]:
        """Shapes and dtypes, as tensors without memory."""
        shapes = {name: part.shape for name, part in self._parts.items()} | self._hollow
        return {name: torch.empty(shape, dtype=self._dtype_of(name), device="meta") for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._hollow:
            return torch.empty(self._hollow[name], dtype=self._dtype)
        part = self._parts[name]
        return part.from_ours(self._tensors[part.ours].detach()).to("cpu", self._dtype_of(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._parts
        yield from self._hollow

    def __len__(self) -> int:
        return len(self._parts) + len(self._hollow)

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._parts and self._parts[name].keeps_fp32 else self._dtype


def _check_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = state_shapes(config)
    problems = [f"no {name}" for name in expected if name not in tensors]
    problems += [f"{name}, which the config has not" for name in tensors if name not in expected]
    problems += [
        f"{name} of shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise TensorMismatchError(problems)


def _name_files(plans: list[TensorFile]) -> list[TensorFile]:
    if len(plans) == 1:
        return [replace(plans[0], name=_SINGLE)]
    return [replace(plan, name=f"model-{i:05}-of-{len(plans):05}.safetensors") for i, plan in enumerate(plans, 1)]


def _publish(
    output: Path, plans: Sequence[TensorFile], tensors: Mapping[str, torch.Tensor], texts: Mapping[str, bytes]
) -> None:
    """Writes all files to a temporary folder beside `output`, which then takes that name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(output.parent, output.name)
    if os.path.lexists(output):
        raise FolderExistsError(output)
    need = sum(plan.size for plan in plans) + sum(map(len, texts.values()))
    free = shutil.disk_usage(output.parent).free
    if free < need:
        raise DiskSpaceError(output, need, free)
    temporary = leftover_path(output, "tmp")
    temporary.mkdir()
    try:
        run_parallel([partial(write_tensors, temporary / plan.name, plan, tensors) for plan in plans])
        run_parallel([partial(write_bytes, temporary / name, text) for name, text in texts.items()])
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(output, need, shutil.disk_usage(output.parent).free) from error
        raise


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise ForeignModelError(folder, [f"no readable {name} ({error})"]) from error


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name with the open safetensors file that holds it."""
    names = [_SINGLE]
    if not (folder / _SINGLE).is_file():
        index = _read_json(folder, _INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ForeignModelError(folder, [f"no weight_map in {_INDEX}"])
        names = sorted({str(file) for file in weight_map.values()})
    sources: dict[str, Any] = {}
    problems = []
    for name in names:
        try:
            if Path(name).name != name:
                raise FileNotFoundError("no name of a file in the folder")
            source = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            problems.append(f"no readable {name} ({error})")
            continue
        keys = list(source.keys())
        problems += [f"{key} in two files" for key in keys if key in sources]
        sources |= dict.fromkeys(keys, source)
    if problems:
        raise ForeignModelError(folder, problems)
    return sources


def _tensor_problems(config: ModelConfig, parts: Mapping[str, Part], sources: Mapping[str, Any]) -> list[str]:
    hollow = hollow_shapes(config)
    problems = [f"no {name}" for name, part in parts.items() if name not in sources and not part.is_copy]
    dtypes: dict[str, str] = {}
    for name, source in sources.items():
        found = source.get_slice(name)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if name not in parts and hollow.get(name) != shape:
            problems.append(f"{name}, which the config has not")
        if name not in parts:
            continue
        if shape != parts[name].shape:
            problems.append(f"{name} of shape {shape}, not {parts[name].shape}")
        if dtype not in _READ:
            problems.append(f"{name} of dtype {dtype}, not {', '.join(_READ)}")
        elif dtypes.setdefault(parts[name].ours, dtype) != dtype:
            problems.append(f"{name} of dtype {dtype}, where its neighbours are {dtypes[parts[name].ours]}")
    return problems


def _assemble(
    shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part], sources: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        if part.is_copy:
            continue
        tensor = sources[name].get_tensor(name)
        if part.is_whole:
            tensors[part.ours] = tensor
            continue
        if part.ours not in tensors:
            tensors[part.ours] = torch.empty(shapes[part.ours], dtype=tensor.dtype)
        part.into_ours(tensors[part.ours], tensor)
    return tensors
