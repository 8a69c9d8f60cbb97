"""Hugging Face checkpoint directories in and out: `load` (also `glmx.load`) and `save`.

On disk experts are separate 2-D tensors and the MTP layer is layer N; in memory gate, up and the experts are
fused, unless they are used as the files store them (models/allocate.py). `_sources` is the one place that knows both
spellings. Tensors are read and written one at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glmx.errors import CheckpointError, UnsupportedError, listed, shown
from glmx.jsonfile import read_bytes
from glmx.models import layout, stored
from glmx.models.allocate import Place, Source, allocate
from glmx.models.config import ModelConfig
from glmx.models.decoder import Decoder
from glmx.models.device import check_model, choose
from glmx.models.fill import fill
from glmx.models.mapped import Mapped, lock_memory
from glmx.models.plan import weight_bytes
from glmx.models.safetensors import INDEX, MAX_HEADER, READABLE, SINGLE, Files, save_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
SHARD_BYTES = 5 * 2**30


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that MODEL names: itself, the newest step of a training run's directory, or a
    Hub id in the local Hub cache (where huggingface_hub is installed; nothing is ever downloaded).

    Raises CheckpointError, for what looks like a Hub id with the command that downloads it.
    """
    name = str(path)
    if not name:
        raise CheckpointError("the model's name is empty, expected a checkpoint directory or a Hub id")
    directory = Path(path)
    try:
        if directory.is_dir():
            return _newest_step(directory)
        there = directory.exists()
    except CheckpointError:  # a ValueError too, which has named its fault
        raise
    except (OSError, ValueError) as error:  # a name too long for a file, or with a NUL in it
        raise CheckpointError(f"cannot read {shown(name)}: {getattr(error, 'strerror', None) or error}") from None
    if there:
        raise CheckpointError(f"'{path}' is a file, expected a checkpoint directory")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        cached = _in_hub_cache(name)
        if cached is not None:
            return cached
        local = name.split("/")[1]
        raise CheckpointError(
            f"no directory '{name}', and no such model in the local Hub cache; if it is a Hub id, download it first: "
            f"hf download {name} --local-dir {local}"
        )
    raise CheckpointError(f"no directory {shown(name)}")


def _newest_step(directory: Path) -> Path:
    latest = directory / "latest"
    if (directory / "config.json").exists() or not latest.is_file():
        return directory
    step = read_bytes(latest, 4096).decode("utf-8", "replace").strip()
    plain = 0 < len(step) <= 200 and "/" not in step and step.isprintable()
    if not plain or not (directory / step).is_dir():
        raise CheckpointError(f"'{latest}' names {shown(step)}, which is no directory in '{directory}'")
    return directory / step


def _in_hub_cache(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # not installed; or not a name that the Hub allows
        return None
    return Path(config).parent if isinstance(config, str) else None


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    dequantize: bool = False,
    mapped: bool = False,
    lock: bool = False,
    check_finite: bool = False,
) -> Decoder:
    """Loads a Hugging Face directory into a Decoder in eval mode.

    device        "auto" (the CPU), "cpu", "cuda" or "cuda:N"; a GPU takes glm4_moe
    dtype         "auto" (the config's), "bf16", "fp32" or a torch.dtype
    dequantize    weights in INT8, INT4 and FP8 become bf16(q * scale), as training needs them and as they do in any
                  fp32 model. Otherwise products use them as they are stored, on the CPU; no GPU has kernels for it yet
    mapped        use the files in place where they hold what the model needs, and copy the rest. They are not to be
                  cut short meanwhile, which would end the process; such a model is neither trained nor saved. A GPU
                  gets copies of all, a few MB at a time
    lock          keep the weights in memory, as the system's limit (ulimit -l) allows; on the CPU
    check_finite  also look for NaN and infinity in every tensor, as the model will hold it
    A router stored in fp32 beside bf16 weights stays fp32, as do the correction biases. Without tensors of the MTP
    layer the model has none. On a terminal a bar shows what takes longer than a second. Raises CheckpointError naming
    every missing, unknown, misshapen or (with check_finite) not finite tensor and UnsupportedError for a model
    that glmx does not compute, or memory that the system does not lock. Nothing of the model's size is allocated before
    the config and every file's header are known to fit; then the peak is the model's own size, less what is mapped,
    and a few pieces of 4 MB.
    """
    where = choose(device)
    directory = resolve(path)
    config = ModelConfig.from_dir(directory)
    compute = _compute_dtype(config, dtype)
    check_model(where, config)
    if lock and where.type != "cpu":
        raise UnsupportedError(f"lock is True and device '{where}': only memory of the CPU can be locked")
    config, files, found = opened(directory, config)
    on_cpu = where.type == "cpu"
    if not (on_cpu or dequantize or compute == torch.float32):
        _refuse_small(found, where, directory)
    model = Decoder(config, compute, "meta")
    _keep_fp32_routers(model, files)
    map_them, keep_small = Mapped(files) if mapped and on_cpu else None, on_cpu and not dequantize
    places = _allocated(model, files, found, map_them, keep_small, where)
    fill(places, _copies(model), found, files, check_finite)
    if lock:
        lock_memory(model.tensors())
    return model.eval()


def opened(directory: Path, config: ModelConfig) -> tuple[ModelConfig, Files, dict[str, stored.Stored]]:
    """The config, without the MTP layer where the files have none; the files of a checkpoint, whose tensors are those
    of the config; and its weights in few bits. Raises CheckpointError and UnsupportedError as `load`.
    """
    # A name, its shape and its range take a hundred bytes or two; metadata may be longer.
    files = Files(directory, max_header=min(MAX_HEADER, 2**20 + 1024 * layout.num_tensors(config)))
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(key.startswith(mtp_prefix) for key in files.keys):
        config = replace(config, num_nextn_predict_layers=0)
    _check_count(config, files, directory)
    found = stored.find(files)
    _check_tensors(Decoder(config, torch.bfloat16, "meta"), files, found, directory)
    return config, files, found


def _check_count(config: ModelConfig, files: Files, directory: Path) -> None:
    """Refuses a config of far more layers or experts than the files hold, before a module is made for each.

    A checkpoint that lacks less than half of its tensors is left to _check_tensors, which names them.
    """
    fused = sum(key.endswith(".mlp.experts.gate_up_proj") for key in files.keys)
    expected = layout.num_tensors(config, fused)
    if expected > 2 * len(files.keys):
        raise CheckpointError(
            f"'{directory}' lacks most of its tensors: it has {len(files.keys)}, config.json describes {expected} "
            f"(num_hidden_layers = {config.num_hidden_layers}, n_routed_experts = {config.n_routed_experts})"
        )


def _check_tensors(model: Decoder, files: Files, found: Mapping[str, stored.Stored], directory: Path) -> None:
    """Compares the files' headers with a model on the meta device: names, shapes, dtypes."""
    expected = {key: source.view.shape for key, source in _expected(model, files.keys).items()}
    optional = {key: tensor.shape for key, tensor in _copies(model).items()}
    wanted = {**optional, **expected}
    of_found = {part: key for key, how in found.items() for part in how.keys}
    there = (files.keys - of_found.keys()) | found.keys()
    missing = sorted(expected.keys() - there)
    unknown = sorted(key for key in files.keys if of_found.get(key, key) not in wanted)
    for what, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise CheckpointError(f"'{directory}' {what} {listed(keys)}")
    for key in there:
        shape = found[key].shape if key in found else files.headers[key].shape
        if shape != wanted[key]:
            raise CheckpointError(f"tensor {key} has shape {list(shape)}, the config expects {list(wanted[key])}")
        if key not in found and files.headers[key].dtype not in READABLE:
            dtype = files.headers[key].dtype
            raise UnsupportedError(f"tensor {key} is {dtype}, only {', '.join(READABLE)} are supported")


def _allocated(
    model: Decoder,
    files: Files,
    found: Mapping[str, stored.Stored],
    mapped: Mapped | None,
    keep_small: bool,
    device: torch.device,
) -> dict[str, Place]:
    try:
        sources = partial(_sources, files.keys)
        return allocate(model, files, found, sources, mapped, keep_small=keep_small, device=device)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        kept = found if keep_small else {}
        size = weight_bytes(model.config, model.dtype, kept, files) / 2**30
        raise CheckpointError(
            f"the model takes {size:.1f} GiB in {_dtype_name(model.dtype)}, which is not free on {device}"
        ) from None


def save(
    model: Decoder,
    path: str | Path,
    tokenizer_files_from: str | Path | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes what `load` and transformers read: safetensors, config.json, generation_config.json.

    Tensors keep the model's dtypes. Everything is written and synced under a temporary name beside `path`,
    then renamed, so `path` is complete or absent. Tokenizer files are copied from `tokenizer_files_from`.
    Raises CheckpointError when `path` exists and is not empty, unless `overwrite`, and ValueError for a model with
    weights that are held as its checkpoint stores them.
    """
    tensors = dict(_named_tensors(model))
    with writing(path, overwrite) as temporary:
        _write_tensors(tensors, temporary, max_shard_bytes)
        write_json(temporary / "config.json", {**model.config.to_dict(), "dtype": _dtype_name(model.dtype)})
        write_json(temporary / "generation_config.json", _generation_config(model.config))
        if tokenizer_files_from is not None:
            copy_files(TOKENIZER_FILES, Path(tokenizer_files_from), temporary)
    return Path(path)


@contextlib.contextmanager
def writing(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which is synced and takes the name `path` when the block ends without an error.

    Raises CheckpointError when `path` exists and is not empty, unless `overwrite`.
    """
    target = Path(path)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if taken and not overwrite:
            raise CheckpointError(f"'{target}' exists; choose another name or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write '{target}': {error.strerror or error}") from None
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if overwrite and target.exists():
            old = target.with_name(f".old-{target.name}-{os.getpid()}")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Those of the files that `source` has."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


# The two spellings.
def _sources(fused: Container[str], name: str, tensor: torch.Tensor) -> list[Source]:
    """The checkpoint's tensors that make up the model's tensor `name`, in their order on disk.

    `fused` has the names of experts that the checkpoint, too, keeps in one tensor.
    """
    return list(_each_source(fused, name, tensor))


def _each_source(fused: Container[str], name: str, tensor: torch.Tensor) -> Iterator[Source]:
    if ".experts." in name and name not in fused:
        prefix, part = name.rsplit(".", 1)
        for e, expert in enumerate(tensor):
            if part == "gate_up_proj":
                gate, up = expert.chunk(2)
                yield Source(f"{prefix}.{e}.gate_proj.weight", gate)
                yield Source(f"{prefix}.{e}.up_proj.weight", up)
            else:
                yield Source(f"{prefix}.{e}.{part}.weight", expert)
    elif name.endswith(".gate_up_proj.weight"):
        gate, up = tensor.chunk(2)
        yield Source(name.replace("gate_up_proj", "gate_proj"), gate)
        yield Source(name.replace("gate_up_proj", "up_proj"), up)
    else:
        yield Source(name, tensor)


def _named_tensors(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield name, tensor


def _expected(model: Decoder, keys: set[str]) -> dict[str, Source]:
    """Checkpoint key -> where it goes; experts in the spelling that the checkpoint uses."""
    out = {}
    for name, tensor in _named_tensors(model):
        for source in _sources(keys, name, tensor):
            out[source.key] = source
    return out


def views(model: Decoder) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of `model`, experts apart, as the parts of the model that hold them."""
    return {key: source.view for key, source in _expected(model, set()).items()}


def _copies(model: Decoder) -> dict[str, torch.Tensor]:
    """Optional tensors, each with the one it repeats: released checkpoints differ in which they carry."""
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    out = {"lm_head.weight": head} if model.config.tie_word_embeddings else {}
    if model.config.num_nextn_predict_layers:
        prefix = f"model.layers.{model.config.num_hidden_layers}"
        out[f"{prefix}.embed_tokens.weight"] = embed
        out[f"{prefix}.shared_head.head.weight"] = head
    return {key: tensor.detach() for key, tensor in out.items()}


def _keep_fp32_routers(model: Decoder, files: Files) -> None:
    """A checkpoint in bf16 that stores a router's matrix in fp32 means it to be computed in fp32."""
    if model.dtype == torch.float32 or model.config.dtype == "float32":
        return
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if name.endswith(".mlp.gate") and key in files.keys and files.headers[key].dtype == "F32":
            module.weight.data = module.weight.data.float()


def _compute_dtype(config: ModelConfig, dtype: str | torch.dtype) -> torch.dtype:
    chosen = _DTYPES.get(config.dtype if dtype == "auto" else dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected auto, bf16, fp32 or torch.bfloat16, torch.float32")
    assert isinstance(chosen, torch.dtype)
    return chosen


def _refuse_small(found: Mapping[str, stored.Stored], device: torch.device, directory: Path) -> None:
    """Refuses weights in few bits that would be computed with as they are stored, for which no GPU has kernels."""
    for key, how in found.items():
        if stored.stays(key):
            raise UnsupportedError(
                f"device '{device}': '{directory}' holds weights in {how.format} (tensor {listed([key])}), which only "
                "the cpu computes with: use device cpu, or dequantize"
            )


# Writing.
def _write_tensors(tensors: Mapping[str, torch.Tensor], directory: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, total = 0, 0
    for name, tensor in tensors.items():
        for key, view in _sources((), name, tensor.detach()):
            if shards[-1] and size + view.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = view
            size += view.nbytes
            total += view.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ids = {"eos_token_id": list(config.eos_token_ids) or None, "pad_token_id": config.pad_token_id}
    return {key: value for key, value in ids.items() if value is not None}


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
