"""What faults are planted in: a small world made by the real commands, and the ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "glm4_moe",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
}
RUN = """\
model = "config"
out = "run"
[data]
shards = "data"
heldout = "heldout"
seq_len = 24
[optim]
lr = 1e-2
min_lr = 1e-3
[train]
steps = 4
batch_rows = 4
micro_rows = 2
[checkpoint]
every_steps = 1
keep = 9
"""


def make_world(world: Path, warm: Any) -> Path:
    """config/, data/, run.toml, and run/: two of its four steps, as if it had been stopped."""
    from glmx.data.shards import write_documents
    from glmx.data.tokenizer import train

    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    tokenizer = train(texts, vocab_size=300)
    (world / "config").mkdir(parents=True)
    (world / "config" / "config.json").write_text(json.dumps(CONFIG))
    tokenizer.save(world / "data")
    write_documents(world / "data", "train", tokenizer, texts[:50])
    write_documents(world / "data", "heldout", tokenizer, texts[50:])
    (world / "run.toml").write_text(RUN)
    stop = "from glmx.train import loop; import os, signal; save = loop.Run.save\n"
    stop += "loop.Run.save = lambda run: (save(run), run.step == 2 and os.kill(os.getpid(), signal.SIGTERM))[0]"
    code, _, err = warm.run(["pretrain", "run.toml"], world, call=stop)
    assert code == 128 + 15, err
    return world


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path, size: int) -> None:
    """Keeps the first `size` bytes, or all but the last -size."""
    file.write_bytes(file.read_bytes()[:size])


def edit_tensors(
    file: Path,
    remove: str = "",
    add: str = "",
    shorten: str = "",
    integers: str = "",
    nan: str = "",
    infinity: str = "",
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in [name for name in tensors if remove and name.startswith(remove)]:
        del tensors[name]
    if add:
        tensors[add] = torch.ones(3)
    if shorten:
        tensors[shorten] = tensors[shorten][:-1].clone()
    if integers:
        tensors[integers] = tensors[integers].to(torch.int32)
    if nan:
        tensors[nan][7] = float("nan")
    if infinity:
        tensors[infinity][7] = float("-inf")
    save_file(tensors, file, metadata={"format": "pt"})


def shard_in_two(folder: Path, missing: bool = False, twice: bool = False) -> None:
    """The weights as two files and an index; one of them missing, or lm_head.weight in both."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {key: names["layers" in key] for key in tensors}
    for name in names:
        part = {key: tensors[key] for key in tensors if index[key] == name or (twice and key == "lm_head.weight")}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if missing:
        (folder / names[1]).unlink()


def make_corpus(folder: Path) -> None:
    """3 MB of Python, the least that the demo takes."""
    from glmx.data import corpus

    folder.mkdir()
    size = 0
    for document in corpus.standard_library().train:
        if size < 3_100_000:
            (folder / document.name.replace("/", "_")).write_bytes(document.data)
            size += len(document.data)
