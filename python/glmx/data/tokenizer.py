"""Byte-level BPE tokenizers in GLM's form: trained here, or read from a Hugging Face directory.

    tokenizer = train(texts, vocab_size=4096); tokenizer.save(out)
    tokenizer = Tokenizer.from_dir(checkpoint)
    ids = tokenizer.encode("def f(x):"); tokenizer.decode(ids) == "def f(x):"

A trained tokenizer has GLM-4.5's layout: ordinary tokens first, then the special tokens in the released
order, then the tags of reasoning and tool calls, which are single tokens but not "special": skipping special
tokens keeps them. Nothing is added to a text silently; what a document or a chat starts with is `prefix_ids`
and the chat template's business.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from glmx.errors import CheckpointError, ConfigError, UnsupportedError, shown
from glmx.jsonfile import MAX_BYTES, read_bytes, read_json

EOS = "<|endoftext|>"
# What GLM puts before every sequence, base-model text included.
PREFIX = ("[gMASK]", "<sop>")
# A turn has no end token: it ends where the next role would begin.
STOP = (EOS, "<|user|>", "<|observation|>")
# Without these as tokens of their own, a chat would be ordinary text that looks like one.
_CHAT_TOKENS = (*PREFIX, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>")
SPECIAL_TOKENS = (
    EOS, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
)  # fmt: skip
TAG_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip
# What each family's checkpoints are released with; GLM-4.7, a glm4_moe like 4.5, carries its own.
_TEMPLATES = {
    "glm4_moe": "chat_template.jinja",
    "glm4_moe_lite": "chat_template_glm5.jinja",
    "glm_moe_dsa": "chat_template_glm5.jinja",
}
_MAX_FILE = 2**28  # bytes of tokenizer.json; GLM's has 20 MB
_MAX_VOCAB = 2**22  # ids; GLM has 151,552. A table this long is made
# GLM-4's split: contractions, words with one leading mark or space, digits by up to 3, runs of marks, runs of
# space.
GLM_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def train(texts: Iterable[str], vocab_size: int, *, pattern: str = GLM_PATTERN) -> Tokenizer:
    """Train a byte-level BPE on `texts`; `vocab_size` counts the special tokens. Same texts, same tokenizer.

    `pattern` is the pre-tokenisation: matches of this regular expression are what merges never cross.

    Raises ConfigError when `vocab_size` has no room for the 256 bytes and the special tokens, or when the
    texts do not yield that many tokens (a model's embedding must not have rows that no text can reach).
    """
    added = len(SPECIAL_TOKENS) + len(TAG_TOKENS)
    if vocab_size < 256 + added:
        raise ConfigError(f"vocab_size = {vocab_size}: at least {256 + added} (256 bytes and {added} special tokens)")
    hf = tokenizers.Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    hf.train_from_iterator(texts, trainer=trainer)
    hf.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    hf.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAG_TOKENS])
    if hf.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"vocab_size = {vocab_size}: the text yields only {hf.get_vocab_size()} tokens; "
            f"ask for at most that many, or give more text"
        )
    return Tokenizer(hf, chat_template=default_chat_template())


def bytes_only() -> Tokenizer:
    """A token for each byte and the special tokens: for models that no tokenizer was made for."""
    tokenizer = train((), 256 + len(SPECIAL_TOKENS) + len(TAG_TOKENS))
    tokenizer.chat_template = None  # its reader takes that of the model's family
    return tokenizer


def default_chat_template(model_type: str = "glm4_moe") -> str:
    """The chat template for a checkpoint that carries none: GLM-4.5's and 4.6's form for glm4_moe, which a trained
    tokenizer is saved with too, and the form of GLM-4.7 and 5 for glm4_moe_lite and glm_moe_dsa."""
    file = resources.files("glmx.data").joinpath(_TEMPLATES[model_type])
    return file.read_text(encoding="utf-8").rstrip("\n")


def check_chat_template(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError naming the file whose chat template jinja cannot read."""
    base = Path(path)
    template, file = _own_chat_template(base, _read_json(base / "tokenizer_config.json"))
    if template is not None:
        _compiled(template, str(file))


class Tokenizer:
    """A byte-level tokenizer with its chat template. `vocab_size` counts all ids, added tokens included."""

    def __init__(
        self,
        hf: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        eos_token: str = EOS,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        if (json.loads(hf.to_str()).get("decoder") or {}).get("type") != "ByteLevel":
            raise UnsupportedError("tokenizer.json: only byte-level tokenizers (decoder ByteLevel) are supported")
        self.hf = hf
        # The same tokenizer, reading special tokens' names as ordinary text: for text nobody vouches for.
        self._plain = tokenizers.Tokenizer.from_str(hf.to_str())
        self._plain.encode_special_tokens = True
        self.chat_template = chat_template
        self.eos_token = eos_token
        self._added = dict(hf.get_added_tokens_decoder())
        self.special_ids = frozenset(i for i, t in self._added.items() if t.special)
        self.vocab_size = max(hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MAX_VOCAB:
            raise CheckpointError(
                f"tokenizer: its ids make a vocabulary of {self.vocab_size}, expected 1..{_MAX_VOCAB}"
            )
        eos = hf.token_to_id(eos_token)
        if eos is None:
            raise CheckpointError(f"tokenizer: eos_token {eos_token!r} is not in the vocabulary")
        self.eos_id: int = eos
        known = [hf.token_to_id(t) for t in STOP]
        self.eos_ids: tuple[int, ...] = tuple(
            eos_ids if eos_ids is not None else dict.fromkeys([eos, *(i for i in known if i is not None)])
        )
        prefix = [i for i in map(hf.token_to_id, PREFIX) if i is not None]
        self.prefix_ids: tuple[int, ...] = tuple(prefix) if len(prefix) == len(PREFIX) else ()

    # -- reading and writing a directory

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, and from beside it the chat template and the stop tokens. Without a template, the
        built-in one of config.json's model_type, if the vocabulary has its tokens. Raises CheckpointError."""
        base = Path(path)
        file = base / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{base}: no tokenizer.json")
        hf = _read_tokenizer(file)
        config = _read_json(base / "tokenizer_config.json")
        template, _ = _own_chat_template(base, config)
        eos_token = config.get("eos_token", EOS)
        if isinstance(eos_token, dict):
            eos_token = eos_token.get("content")
        if not isinstance(eos_token, str):
            raise CheckpointError(f"{base / 'tokenizer_config.json'}: eos_token is {shown(eos_token)}, expected text")
        eos_ids = None
        for name in ("generation_config.json", "config.json"):
            if eos_ids is None:
                eos_ids = _ids(base / name, _read_json(base / name).get("eos_token_id"))
        if template is None and all(hf.token_to_id(token) is not None for token in _CHAT_TOKENS):
            model_type = _read_json(base / "config.json").get("model_type")
            if isinstance(model_type, str) and model_type in _TEMPLATES:
                template = default_chat_template(model_type)
        tokenizer = cls(hf, chat_template=template, eos_token=eos_token, eos_ids=eos_ids)
        _ = tokenizer._table  # what it cannot decode is said here, not in the middle of a generation
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
        base = Path(path)
        base.mkdir(parents=True, exist_ok=True)
        (base / "tokenizer.json").write_text(self.hf.to_str(pretty=True), encoding="utf-8")
        added = {
            str(i): {
                "content": t.content,
                "lstrip": t.lstrip,
                "normalized": t.normalized,
                "rstrip": t.rstrip,
                "single_word": t.single_word,
                "special": t.special,
            }
            for i, t in sorted(self._added.items())
        }
        config = {
            "added_tokens_decoder": added,
            "additional_special_tokens": [t.content for i, t in sorted(self._added.items()) if t.special],
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": self.eos_token,
            "model_max_length": 131072,
            "pad_token": self.eos_token,
            "padding_side": "left",
            "remove_space": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (base / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (base / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @cached_property
    def sha256(self) -> str:
        """Of tokenizer.json's content, whatever its white space: what token shards remember they were made
        with."""
        return hashlib.sha256(self.hf.to_str().encode()).hexdigest()

    # -- text and ids

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The ids of `text`, nothing added. `allow_special=False` reads `<|user|>` and the like as ordinary
        text. Raises ValueError for text that no UTF-8 can hold (a lone surrogate)."""
        try:
            return (self.hf if allow_special else self._plain).encode(text, add_special_tokens=False).ids
        except TypeError as e:  # all that the library says is "must be str"
            wrong = [(place, c) for place, c in enumerate(text) if "\ud800" <= c <= "\udfff"]
            if not wrong:
                raise
            place, c = wrong[0]
            raise ValueError(f"the text is not valid Unicode: lone surrogate U+{ord(c):04X} at {place}") from e

    def encode_document(self, text: str) -> list[int]:
        """A training document: `prefix_ids`, the text (special tokens' names as ordinary text), `eos_id`."""
        return [*self.prefix_ids, *self.encode(text, allow_special=False), self.eos_id]

    def encode_documents(self, texts: Sequence[str], batch: int = 64) -> Iterator[list[int]]:
        """`encode_document` of each text in order, on all threads of the tokenizers library."""
        for i in range(0, len(texts), batch):
            for e in self._plain.encode_batch(list(texts[i : i + batch]), add_special_tokens=False):
                yield [*self.prefix_ids, *e.ids, self.eos_id]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Reasoning and tool tags are never
        skipped."""
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        skip = self.special_ids if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in skip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for an id the vocabulary skips. Raises ValueError outside of
        it."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id}: expected 0 <= id < {self.vocab_size}")
        return self._table[token_id]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab_size]: the bytes of text each token accounts for, 0 for special tokens (bits per
        byte)."""
        lengths = np.array([len(b) for b in self._table], np.int32)
        lengths[sorted(self.special_ids)] = 0
        return lengths

    @cached_property
    def _table(self) -> list[bytes]:
        alphabet = _byte_alphabet()
        table = [b""] * self.vocab_size
        for token, i in self.hf.get_vocab(with_added_tokens=True).items():
            if i in self._added:
                table[i] = token.encode("utf-8")
            elif all(c in alphabet for c in token):
                table[i] = bytes(alphabet[c] for c in token)
            else:
                raise CheckpointError(f"tokenizer: token {i}, {shown(token)}, is not in the byte-level alphabet")
        return table

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one streamed sequence."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    # -- chat

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat, by the checkpoint's own template, rendered in jinja's immutable sandbox.

        `enable_thinking=None` leaves it undefined, which a template may tell from True. Raises
        UnsupportedError without a template, CheckpointError for a template that is none, ValueError when it
        refuses the messages or fails on them.
        """
        if self.chat_template is None:
            raise UnsupportedError("this checkpoint has no chat template (chat_template.jinja); give a plain prompt")
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        import jinja2

        template = self._template
        tokens = {"eos_token": self.eos_token, "pad_token": self.eos_token}
        try:
            return template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **(tokens | variables),
            )
        except jinja2.TemplateError as e:
            raise ValueError(f"messages: the chat template refuses them: {e}") from e
        except Exception as e:  # a template is a program: what it adds, divides or iterates over may be anything
            raise ValueError(f"messages: the chat template fails on them: {type(e).__name__}: {e}") from e

    @cached_property
    def _template(self) -> Any:
        return _compiled(self.chat_template or "", "chat_template")


class Detokenizer:
    """Text of one growing sequence: `push` returns what is new and complete, `flush` the rest.

    A character whose bytes are spread over several tokens is held back until its last byte is there, so the
    pieces joined equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        new = [ids] if isinstance(ids, int) else ids
        return self._utf8.decode(self._tokenizer.decode_bytes(new, skip_special_tokens=self._skip))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, by the tokenizers library."""
    data = read_bytes(file, _MAX_FILE)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as e:  # bare Exception for a file it cannot parse; a panic of its Rust is a BaseException
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{file}: not a tokenizer: {shown(str(e))}") from None


def _text(file: Path) -> str:
    try:
        return read_bytes(file, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{file}: not UTF-8: {e}") from None


def _compiled(template: str, name: str) -> Any:
    """The template in jinja's immutable sandbox. Raises CheckpointError, which begins with `name`."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **kwargs)

    # The settings transformers renders with: templates are written against them.
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols], autoescape=False
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    try:
        return env.from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise CheckpointError(f"{name}: line {e.lineno}: {e.message}") from e
    except Exception as e:  # it becomes Python, which has limits of its own: of nesting, for one
        raise CheckpointError(f"{name}: {shown(str(e))}") from e


def _own_chat_template(base: Path, config: dict[str, Any]) -> tuple[str | None, Path]:
    """The template that a checkpoint carries, and the file it is in."""
    file, own = base / "tokenizer_config.json", base / "chat_template.jinja"
    template = _chat_template(file, config.get("chat_template"))
    return (_text(own), own) if own.is_file() else (template, file)


def _chat_template(file: Path, template: Any) -> str | None:
    """The template in tokenizer_config.json: text, or several named ones, of which the one called default."""
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{file}: chat_template is {shown(template)}, expected text")
    return template


def _ids(file: Path, value: Any) -> list[int] | None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id is {shown(value)}, expected token ids")
    return None if value is None else ids


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}
