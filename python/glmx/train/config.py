"""The run configuration: typed structs, overridden by a TOML file and then by `--section.key value`.

An unknown key is an error that names the nearest known one; a wrong type or value is an error that names
the key, the value and what is allowed. The model's shape is not here: it comes from the `config.json` of
`model`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from glmx.errors import ConfigError

PositiveInt = Annotated[int, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
MAX_INT = 2**63 - 1  # of seeds and counts; TOML knows no larger one either
Beta = Annotated[float, Meta(ge=0, lt=1)]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every section: immutable, and closed to unknown keys."""


class Data(Section, frozen=True):
    shards: str  # directory of token shards, as glmx.data.shards writes them
    train: str = "train"  # name of the set to train on
    heldout: str = ""  # name of the set to measure on; without one there are no held-out records
    seq_len: PositiveInt = 512  # tokens per packed row


class Optim(Section, frozen=True):
    """AdamW; learning rate: linear warm-up to `lr`, then a cosine to `min_lr` at the last planned token."""

    lr: Positive = 3e-3
    min_lr: NonNegative = 3e-4
    warmup_tokens: Count = 0
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1  # on matrices; not on norms, biases and the token embedding (see optim.py)
    clip: NonNegative = 1.0  # limit of the global gradient norm; 0 does not clip


class Train(Section, frozen=True):
    """How long and how wide. Exactly one of `tokens` and `steps` is set; tokens round up to whole steps."""

    tokens: Count = 0
    steps: Count = 0
    batch_rows: PositiveInt = 16  # rows of seq_len tokens per optimizer step
    micro_rows: PositiveInt = 4  # rows per forward and backward; bounds the activation memory
    seed: Count = 0  # of the initial weights and of the order of the data
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the parameters and of the computation; masters are fp32
    device: str = "auto"  # auto (the CPU), cpu, cuda or cuda:N (glmx.models.device)
    minutes: NonNegative = 0.0  # stop cleanly after this much wall time in one invocation; 0 does not stop


class Balance(Section, frozen=True):
    """Expert balance: the loss-free bias update (arXiv 2408.15664) and DeepSeek-V3's sequence-wise loss."""

    rate: NonNegative = 1e-3  # bias update per optimizer step; 0 leaves the bias alone
    freeze_after_tokens: Count = 0  # no bias update once this many tokens are trained; 0 never freezes
    aux_weight: NonNegative = 1e-4  # weight of the sequence-wise balance loss


class Indexer(Section, frozen=True):
    """How the indexers of a glm_moe_dsa learn: KL to the attention that uses their lists (DeepSeek-V3.2, 2.1).

    None: not given, and the default holds. For a model without indexers nothing may be given.
    """

    # Of the KL in the gradient (default 1); 0 freezes the indexers. Nothing else reaches them and AdamW's updates do
    # not change with a gradient's scale, so it matters against `optim.clip` and `optim.eps` alone; 1 is far from eps.
    weight: NonNegative | None = None
    dense_tokens: Count | None = None  # until so many are trained, attention and KL take every key (default 0)
    only: bool | None = None  # train the indexers alone, the rest frozen (default false): GLM-5's warm-up


class Checkpoint(Section, frozen=True):
    every_steps: Count = 200  # 0: only at the end
    keep: PositiveInt = 2  # the newest so many stay


class Eval(Section, frozen=True):
    every_steps: Count = 0  # 0: only at the end
    tokens: Count = 0  # about so many, spread over the held-out text; 0, and the last measurement, take all


class PretrainConfig(Section, frozen=True):
    model: str  # directory: with weights the run continues them, with config.json alone it starts fresh
    out: str  # directory of the run: log.jsonl, step-XXXXXXXX/, latest
    data: Data
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    balance: Balance = field(default_factory=Balance)
    indexer: Indexer = field(default_factory=Indexer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    mtp_loss_weight: NonNegative = 0.3  # of the MTP layer's loss; without an MTP layer there is none
    # How often the MTP layer is applied, each time to its own hidden states: step s learns the token s + 1 ahead. GLM-5
    # trains three. The weight is of the mean over steps.
    mtp_steps: PositiveInt = 1

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_rows * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Planned optimizer steps; a token budget is rounded up to whole steps."""
        return self.train.steps or -(-self.train.tokens // self.tokens_per_step)


# Keys that may differ between a checkpoint and the run that resumes it: none of them reaches a weight.
FREE_ON_RESUME = ("out", "data.heldout", "train.minutes", "checkpoint.", "eval.")


def load_config(path: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Reads a run's TOML file and applies `--a.b value` pairs on top. Raises ConfigError."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for key, text in _pairs(overrides or []):
        _set(raw, key, text)
    return make_config(raw)


def make_config(raw: dict[str, Any]) -> PretrainConfig:
    """Checks a nested dict (TOML's shape) and returns the typed configuration. Raises ConfigError."""
    _refuse_unknown(raw, PretrainConfig, "")
    try:
        config = msgspec.convert(raw, PretrainConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), raw)) from None
    _check(config)
    return config


def as_dict(config: PretrainConfig) -> dict[str, Any]:
    return msgspec.to_builtins(config)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def refuse_changed(saved: dict[str, Any], config: PretrainConfig) -> None:
    """Raises ConfigError naming every key whose change makes the resumed run another run.

    A key that `saved` lacks is younger than the checkpoint, which was made with its default.
    """
    defaults = PretrainConfig(model="", out="", data=Data(shards=""))
    old, new = _reaching({**flatten(as_dict(defaults)), **flatten(saved)}), _reaching(flatten(as_dict(config)))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        now = " and ".join(f"{key} is {new.get(key)!r}" for key in changed)
        then = " and ".join(repr(old.get(key)) for key in changed)
        raise ConfigError(
            f"{now}, but the checkpoint in {config.out} was made with {then}: "
            f"set it back, or choose another `out` to start afresh"
        )


def fingerprint(config: PretrainConfig) -> str:
    """Hash of every key that reaches a weight: equal for runs that must give the same bits."""
    kept = _reaching(flatten(as_dict(config)))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _reaching(flat: dict[str, Any]) -> dict[str, Any]:
    """The keys that reach a weight; of the device its kind alone (auto is the CPU)."""
    kept = {key: value for key, value in flat.items() if not key.startswith(FREE_ON_RESUME)}
    device = str(kept["train.device"])
    return {**kept, "train.device": "cpu" if device == "auto" else device.partition(":")[0]}


def known_keys(struct: type[Struct] = PretrainConfig, prefix: str = "") -> dict[str, type]:
    """Every dotted key that can be set, with its type."""
    keys: dict[str, Any] = {}
    for info in msgspec.structs.fields(struct):
        if isinstance(info.type, type) and issubclass(info.type, Struct):
            keys |= known_keys(info.type, f"{prefix}{info.name}.")
        else:
            keys[prefix + info.name] = info.type
    return keys


def _pairs(overrides: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(overrides)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) == 2:
            raise ConfigError(f"{name!r}: overrides are written --section.key value")
        key, equals, value = name[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _set(raw: dict[str, Any], key: str, text: str) -> None:
    types = known_keys()
    if key not in types:
        raise _unknown(key, list(types))
    value: Any = text
    if types[key] not in (str, str | None):
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # a bare word such as bf16; a wrong one is refused by its type below
    *sections, name = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{section} is {raw!r}: expected a section")
    raw[name] = value


def _unknown(key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"unknown key {key!r}: did you mean {near[0]!r}?" if near else f"unknown key {key!r}")


def _refuse_unknown(raw: dict[str, Any], struct: type[Struct], prefix: str) -> None:
    fields = {info.name: info.type for info in msgspec.structs.fields(struct)}
    for key, value in raw.items():
        if key not in fields:
            # A key in the wrong section is looked up among all keys first, by its last name.
            elsewhere = [k for k in known_keys() if k.rpartition(".")[2] == key]
            raise _unknown(prefix + key, elsewhere or [prefix + f for f in fields])
        kind = fields[key]
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Struct):
            _refuse_unknown(value, kind, f"{prefix}{key}.")


def _explain(message: str, raw: dict[str, Any]) -> str:
    """msgspec's "Expected `float`, got `str` - at `$.optim.lr`" with the key first and the value given."""
    what, _, path = message.partition(" - at `$.")
    path = path.rstrip("`")
    what = re.sub(r"`(float|int|str|bool|object)(?: \| null)?`", r"\1", what)
    if missing := re.search(r"missing required field `(\w+)`", what):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return f"{name} is missing: it has no default"
    value: Any = raw
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if path == "train.dtype":
        what = "Expected 'bf16' or 'fp32'"
    return f"{path} is {value!r}: {what[:1].lower()}{what[1:]}"


def _check(config: PretrainConfig) -> None:
    train, optim = config.train, config.optim
    for key, value in flatten(as_dict(config)).items():
        if isinstance(value, float) and math.isinf(value):  # NaN passes no bound, infinity passes most
            raise ConfigError(f"{key} is {value}: expected a finite number")
        if isinstance(value, int) and value > MAX_INT:
            raise ConfigError(f"{key} is {value}: expected at most {MAX_INT}")
    if bool(train.tokens) == bool(train.steps):
        raise ConfigError(
            f"train.tokens is {train.tokens} and train.steps is {train.steps}: set exactly one of them above 0"
        )
    if train.batch_rows % train.micro_rows:
        raise ConfigError(
            f"train.micro_rows is {train.micro_rows}: it must divide train.batch_rows, which is {train.batch_rows}"
        )
    if optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr is {optim.min_lr}: it must not exceed optim.lr, which is {optim.lr}")
    if config.mtp_steps > 1 and not config.mtp_loss_weight:
        raise ConfigError(f"mtp_steps is {config.mtp_steps} and mtp_loss_weight is 0.0: no step would be trained")
    if config.mtp_steps > config.data.seq_len:
        raise ConfigError(
            f"mtp_steps is {config.mtp_steps}: it must not exceed data.seq_len, which is {config.data.seq_len}"
        )
    if config.indexer.only and config.indexer.weight == 0:
        raise ConfigError("indexer.only is True and indexer.weight is 0.0: nothing would be trained")
    planned = config.total_steps * config.tokens_per_step
    if optim.warmup_tokens > planned:
        raise ConfigError(f"optim.warmup_tokens is {optim.warmup_tokens}: the run has only {planned} tokens in all")
