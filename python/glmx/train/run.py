"""The state of a training run: what a checkpoint holds, how it starts, resumes and is saved."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from glmx.errors import CheckpointError, ConfigError
from glmx.train import checkpoint
from glmx.train.balance import router_biases
from glmx.train.config import PretrainConfig, as_dict, fingerprint, refuse_changed
from glmx.train.optim import AdamW, part_of

if TYPE_CHECKING:
    from glmx.data.packing import PackedBatch
    from glmx.data.shards import TokenShards
    from glmx.data.tokenizer import Tokenizer
    from glmx.models.decoder import Decoder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Held-out documents are scored in windows that overlap by this share of seq_len, so that scored tokens have
# context.
HELDOUT_CONTEXT = 0.25


class Run:
    """One run. `step`, `tokens` and `seconds` count what is trained; `saved` is the newest checkpoint."""

    def __init__(self, config: PretrainConfig, model: Decoder, heldout: TokenShards | None, rows: Any) -> None:
        self.config, self.model, self.heldout, self.rows = config, model, heldout, rows
        self.out = Path(config.out)
        self.tokenizer_dir = _tokenizer_dir(config)
        self.byte_lengths = self._byte_lengths()
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.saved: Path | None = None
        self.lock = -1
        self.with_mtp = config.mtp_loss_weight > 0 and model.config.num_nextn_predict_layers > 0
        if config.mtp_steps > 1 and not self.with_mtp:
            raise ConfigError(
                f"mtp_steps is {config.mtp_steps}, but the model of {config.model} has no MTP layer: leave it out"
            )
        self.kl_weight = _kl_weight(config, model)
        # Of indexers that are trained alone no other loss has a gradient.
        self.aux_weight = 0.0 if config.indexer.only else config.balance.aux_weight
        for name, parameter in model.named_parameters():
            trained = self.kl_weight > 0 if part_of(name) == "indexer" else not config.indexer.only
            parameter.requires_grad_(trained)
        optim = config.optim
        self.optim = AdamW(
            model.named_parameters(),
            beta1=optim.beta1,
            beta2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.biases = router_biases(model)
        model.train()
        model.collect_scores = self.aux_weight > 0
        model.collect_kl = self.kl_weight > 0

    @classmethod
    def start(cls, config: PretrainConfig) -> Run:
        """Opens the data, builds or loads the model, and resumes what `out` holds. Raises before it trains, and then
        leaves no directory that it made."""
        from glmx.models.device import choose

        device = choose(config.train.device)
        out, lock = Path(config.out), -1
        try:
            with checkpoint.making(out):
                lock = checkpoint.lock(out)
                run = cls._prepared(config, device)
                checkpoint.clean(out)
                checkpoint.cut_log(out / "log.jsonl", run.step)
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise
        run.lock = lock
        return run

    @classmethod
    def _prepared(cls, config: PretrainConfig, device: torch.device) -> Run:
        from glmx.data.packing import PackedRows
        from glmx.data.shards import TokenShards

        train = config.train
        found = checkpoint.latest(Path(config.out))
        saved = checkpoint.read(found) if found else None
        if saved:
            refuse_changed(saved.state["config"], config)
        shards = TokenShards.open(config.data.shards, config.data.train)
        heldout = None
        if config.data.heldout:
            heldout = TokenShards.open(config.data.shards, config.data.heldout)
        rows = PackedRows(
            shards,
            seq_len=config.data.seq_len,
            batch_rows=train.batch_rows,
            micro_rows=train.micro_rows,
            seed=train.seed,
            mtp_steps=config.mtp_steps,
        )
        torch.manual_seed(train.seed)
        model = build_model(found or Path(config.model), DTYPES[train.dtype], train.seed, device)
        for data in filter(None, (shards, heldout)):
            _ = data.tokens_sha256  # reads and checks every token
            if data.vocab_size > model.config.vocab_size:
                raise ConfigError(
                    f"{config.data.shards}: the shards' vocabulary has {data.vocab_size} tokens, "
                    f"the model's {model.config.vocab_size} (vocab_size in {config.model}/config.json)"
                )
        run = cls(config, model, heldout, rows)
        if saved:
            run._restore(saved)
        return run

    def close(self) -> None:
        """Lets another process train in `out`."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def next_batch(self) -> list[PackedBatch]:
        """The micro-batches of the next optimizer step."""
        return self.rows.next_step()

    def save(self) -> None:
        """Writes a checkpoint unless the newest is of this step. Raises CheckpointError."""
        from glmx.models.checkpoint import save

        if self.saved and self.saved.name == checkpoint.step_name(self.step):
            return
        tensors = self.optim.state_dict()
        tensors["rng.torch"] = torch.get_rng_state()
        state = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "updates": self.optim.updates,
            "cursor": self.rows.state_dict(),
            "config": as_dict(self.config),
            "fingerprint": fingerprint(self.config),
        }
        self.saved = checkpoint.write(
            self.out,
            self.step,
            save_model=lambda path: save(self.model, path, tokenizer_files_from=self.tokenizer_dir),
            tensors=tensors,
            state=state,
            keep=self.config.checkpoint.keep,
        )

    def _restore(self, saved: checkpoint.Saved) -> None:
        tensors, state = dict(saved.tensors), saved.state
        try:
            torch.set_rng_state(tensors.pop("rng.torch"))
            self.optim.load_state_dict(tensors, state["updates"])
            self.rows.load_state_dict(state["cursor"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{saved.path}/trainer does not fit this run: {error}") from error
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.saved = saved.path

    def heldout_record(self, last: bool) -> dict[str, Any] | None:
        """Measures the held-out shards, all of them the `last` time; None without them.

        heldout_bpb is null without a tokenizer.
        """
        from glmx.data.packing import HeldoutRows
        from glmx.models import likelihood

        if self.heldout is None:
            return None
        seq_len, limit = self.config.data.seq_len, self.config.eval.tokens
        batches = HeldoutRows(
            self.heldout,
            seq_len=seq_len,
            batch_tokens=self.config.train.micro_rows * seq_len,
            context=int(seq_len * HELDOUT_CONTEXT),
            every=1 if last or not limit else -(-self.heldout.num_tokens // limit),
        )
        self.model.eval()
        found = likelihood.measure(self.model, batches, self.byte_lengths)
        self.model.train()
        return {
            "step": self.step,
            "tokens": self.tokens,
            "heldout_loss": found.nats_per_token,
            "heldout_bpb": found.bits_per_byte,
        }

    def _byte_lengths(self) -> torch.Tensor | None:
        """Of each token, where held-out text is measured and a tokenizer found. Raises ConfigError for another one."""
        if self.tokenizer_dir is None or self.heldout is None:
            return None
        from glmx.data.tokenizer import Tokenizer

        tokenizer: Tokenizer = Tokenizer.from_dir(self.tokenizer_dir)
        if self.heldout.tokenizer_sha256 and tokenizer.sha256 != self.heldout.tokenizer_sha256:
            raise ConfigError(
                f"{self.tokenizer_dir}/tokenizer.json is not the tokenizer that {self.config.data.shards} was made with"
            )
        return torch.from_numpy(tokenizer.byte_lengths).long()

    def open_log(self, on_record: Callable[[dict[str, Any]], None] | None = None) -> Log:
        return Log(self.out / "log.jsonl", on_record)


class Log:
    """log.jsonl, one record per line, handed to `on_record` too; a context manager."""

    def __init__(self, path: Path, on_record: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self.on_record = path, on_record

    def __enter__(self) -> Log:
        # Unbuffered: after a failed write nothing is left that closing would try to write again.
        self.file = open(self.path, "ab", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """One write, so that `tail -f` shows whole lines; sync() makes it last. Raises CheckpointError."""
        line = memoryview((json.dumps(record) + "\n").encode())
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            raise self._failed(error) from error
        if self.on_record:
            self.on_record(record)

    def sync(self) -> None:
        """On disk before a checkpoint is: a resumed run finds every record up to its step. Raises CheckpointError."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"could not write {self.path}: {error.strerror}; the same command goes on from the last checkpoint"
        )


def build_model(path: Path, dtype: torch.dtype, seed: int, device: torch.device = torch.device("cpu")) -> Decoder:
    """`path` with weights: loads them. With config.json alone: fresh ones from initializer_range and seed.

    `path` may be another run's directory: its newest checkpoint. Raises ConfigError, CheckpointError.
    """
    from glmx.models.checkpoint import load, resolve
    from glmx.models.config import ModelConfig
    from glmx.models.decoder import Decoder

    try:
        path = resolve(path)
    except CheckpointError as error:
        raise ConfigError(f"model is {str(path)!r}: {error}") from None
    if any(path.glob("*.safetensors*")):  # the files, or an index of files that load will miss by name
        return load(path, device, dtype, dequantize=True)
    if not (path / "config.json").is_file():
        raise ConfigError(f"model is {str(path)!r}: no config.json there; expected a Hugging Face directory")
    config = dataclasses.replace(ModelConfig.from_dir(path), dtype=str(dtype).removeprefix("torch."))
    model = Decoder(config, dtype, device)
    model.init_weights(seed)
    return model


def _kl_weight(config: PretrainConfig, model: Decoder) -> float:
    """Of the indexers' loss; 0 trains none. Raises ConfigError for keys of [indexer] where the model has none."""
    given = {key: value for key, value in msgspec.to_builtins(config.indexer).items() if value is not None}
    if model.config.model_type == "glm_moe_dsa":
        return given.get("weight", 1.0)
    for key, value in given.items():
        raise ConfigError(
            f"indexer.{key} is {value}, but the {model.config.model_type} of {config.model} has no indexers: "
            "leave it out"
        )
    return 0.0


def _tokenizer_dir(config: PretrainConfig) -> Path | None:
    """Where tokenizer.json is: beside the shards, or in the model's directory."""
    return next((d for d in map(Path, (config.data.shards, config.model)) if (d / "tokenizer.json").is_file()), None)
