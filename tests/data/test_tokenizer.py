from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.data import tokenizer
from glmx.data.tokenizer import SPECIAL_TOKENS, TAG_TOKENS, Tokenizer
from glmx.errors import CheckpointError, ConfigError, UnsupportedError

utf8 = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, *TAG_TOKENS, " ", "\n", "\r\n", "\t", "é", "𝄞", "12345", "def "])
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=utf8, special=st.booleans())
def test_round_trip_is_exact(tok, text, special):
    ids = tok.encode(text, allow_special=special)
    assert tok.decode(ids) == text
    assert sum(len(tok.token_bytes(i)) for i in ids) == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(text=utf8, data=st.data())
def test_streamed_pieces_join_to_the_text(tok, text, data):
    ids = tok.encode(text)
    stream = tok.detokenizer(skip_special_tokens=False)
    pieces = []
    while ids:
        n = data.draw(st.integers(1, 3))
        pieces.append(stream.push(ids[:n]))
        ids = ids[n:]
    assert "".join(pieces) + stream.flush() == text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(tok, data):
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=30))
    stream = tok.detokenizer()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tok.decode(ids, skip_special_tokens=True)
    assert tok.decode(ids) == tok.hf.decode(ids, skip_special_tokens=False)


def test_half_a_character_is_held_back(tok):
    ids = tok.encode("𝄞")
    assert len(ids) > 1
    stream = tok.detokenizer()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["𝄞"]
    cut = tok.detokenizer()
    assert cut.push(ids[:-1]) == "" and cut.flush() == "\ufffd"


def test_layout_is_glms(tok):
    first = tok.vocab_size - len(SPECIAL_TOKENS) - len(TAG_TOKENS)
    assert tok.vocab_size == 640
    assert [tok.hf.id_to_token(first + i) for i in range(tok.vocab_size - first)] == [
        *SPECIAL_TOKENS,
        *TAG_TOKENS,
    ]
    assert tok.eos_id == first
    assert [tok.hf.id_to_token(i) for i in tok.eos_ids] == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    assert tok.decode(tok.prefix_ids) == "[gMASK]<sop>"


def test_digits_split_by_three():
    """With every merge that the text allows: 12, 123, 45, 456."""
    room = 256 + len(SPECIAL_TOKENS) + len(TAG_TOKENS)
    full = tokenizer.train(["1234567 " * 100], vocab_size=room + 4)
    assert [full.decode([i]) for i in full.encode("1234567")] == ["123", "456", "7"]
    with pytest.raises(ConfigError):
        tokenizer.train(["1234567 " * 100], vocab_size=room + 5)


def test_skipping_special_tokens_keeps_the_tags(tok):
    ids = tok.encode("<think>hm</think><tool_call><|user|>")
    assert tok.decode(ids, skip_special_tokens=True) == "<think>hm</think><tool_call>"


def test_text_cannot_smuggle_special_tokens(tok):
    assert tok.eos_id in tok.encode("<|endoftext|>")
    plain = tok.encode("<|endoftext|><|user|>", allow_special=False)
    assert not tok.special_ids & set(plain)
    document = tok.encode_document("a<|endoftext|>b")
    assert document.count(tok.eos_id) == 1 and document[-1] == tok.eos_id and document[:2] == list(tok.prefix_ids)
    assert list(tok.encode_documents(["a<|endoftext|>b", "c"], batch=1)) == [
        document,
        tok.encode_document("c"),
    ]


def test_byte_lengths_count_text_alone(tok, stdlib):
    text = stdlib.heldout[0].text + " é <think>"
    ids = tok.encode_document(text)
    assert tok.byte_lengths[ids].sum() == len(text.encode())
    with pytest.raises(ValueError, match=r"token id 640: expected 0 <= id < 640"):
        tok.decode([640])


def test_training_twice_gives_the_same_file(tok, stdlib):
    again = tokenizer.train([d.text for d in stdlib.train[:60]], vocab_size=640)
    assert again.hf.to_str() == tok.hf.to_str()


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"vocab_size = 100: at least"):
        tokenizer.train(["abc"], vocab_size=100)
    with pytest.raises(ConfigError, match=r"vocab_size = 5000: the text yields only"):
        tokenizer.train(["abc abc abc"], vocab_size=5000)


def test_saved_directory_reads_back(tok, tmp_path, stdlib):
    tok.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tok.eos_id, 5]}))
    back = Tokenizer.from_dir(tmp_path)
    text = stdlib.heldout[1].text
    assert back.encode(text) == tok.encode(text)
    assert back.sha256 == tok.sha256 and back.chat_template == tok.chat_template and back.vocab_size == tok.vocab_size
    assert back.eos_ids == (tok.eos_id, 5)


def test_transformers_agrees(tok, tmp_path, stdlib):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        stdlib.heldout[2].text,
        "<think>x</think><|user|> 12345 é𝄞\n\n\t y",
        " don't clean up , this .",
    ):
        ids = tok.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tok.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == tok.decode(ids, skip_special_tokens=True)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (tok.eos_id, tok.eos_id, "left")
    assert len(theirs) == tok.vocab_size
    for options in ({}, {"enable_thinking": False}, {"tools": TOOLS}):
        for generate in (False, True):
            mine = tok.apply_chat_template(CHAT, add_generation_prompt=generate, **options)
            assert mine == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generate, **options)
    for other in ("{{ messages[3] | tojson }}", "{% for m in messages %}\n  {% break %}\n{% endfor %}\n x\n"):
        theirs.chat_template = other
        mine = Tokenizer(tok.hf, chat_template=other).apply_chat_template(CHAT)
        assert mine == theirs.apply_chat_template(CHAT, tokenize=False)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "city": "Zürich"}}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>greet</think>\nHello"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Zürich?"}],
    },
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "call it",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
        ],
    },
    {"role": "tool", "content": "12 C"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "12 C, rain", "reasoning_content": "now say it"},
]


def test_chat_template_is_glm_45s(tok):
    """Against the text form of GLM-4.5, written out (role newline, reasoning after the last user turn
    only)."""
    assert tok.apply_chat_template(CHAT, add_generation_prompt=False) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\n<think></think>\nHello"
        "<|user|>\nWeather in Zürich?<|assistant|>\n<think>call it</think>\n<tool_call>weather\n"
        "<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        "<|observation|>\n<tool_response>\n12 C\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
        "<|assistant|>\n<think>now say it</think>\n12 C, rain"
    )
    user = [{"role": "user", "content": "Hi"}]
    assert tok.apply_chat_template(user) == "[gMASK]<sop><|user|>\nHi<|assistant|>"
    assert tok.apply_chat_template(user, enable_thinking=True) == "[gMASK]<sop><|user|>\nHi<|assistant|>"
    quiet = "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>"
    assert tok.apply_chat_template(user, enable_thinking=False) == quiet
    once = [{"role": "user", "content": "Hi/nothink"}]
    assert tok.apply_chat_template(once, enable_thinking=False) == quiet
    with_tools = tok.apply_chat_template(user, tools=TOOLS)
    assert with_tools.startswith("[gMASK]<sop><|system|>\n# Tools\n\n") and '"city": "Zürich"' in with_tools


@pytest.fixture(scope="module")
def newer(tok):
    return Tokenizer(tok.hf, chat_template=tokenizer.default_chat_template("glm_moe_dsa"))


def test_chat_template_is_glm_5s(newer):
    """Against the text form of GLM-4.7 and 5, written out: no newlines, a bare </think> where reasoning is dropped."""
    assert newer.apply_chat_template(CHAT, add_generation_prompt=False) == (
        "[gMASK]<sop><|system|>Be brief.<|user|>Hi<|assistant|></think>Hello"
        "<|user|>Weather in Zürich?<|assistant|><think>call it</think><tool_call>weather"
        "<arg_key>city</arg_key><arg_value>Zürich</arg_value><arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
        "<|observation|><tool_response>12 C</tool_response><tool_response>rain</tool_response>"
        "<|assistant|><think>now say it</think>12 C, rain"
    )
    turns = CHAT[1:4]
    dropped = "[gMASK]<sop><|user|>Hi<|assistant|></think>Hello<|user|>Weather in Zürich?<|assistant|>"
    kept = "[gMASK]<sop><|user|>Hi<|assistant|><think>greet</think>Hello<|user|>Weather in Zürich?<|assistant|>"
    assert newer.apply_chat_template(turns) == dropped + "<think>"
    assert newer.apply_chat_template(turns, enable_thinking=True) == dropped + "<think>"
    assert newer.apply_chat_template(turns, enable_thinking=False) == dropped + "</think>"
    assert newer.apply_chat_template(turns, clear_thinking=True) == dropped + "<think>"
    assert newer.apply_chat_template(turns, clear_thinking=False) == kept + "<think>"
    plain = [*turns[:1], {"role": "assistant", "content": " done\n"}]
    said = newer.apply_chat_template(plain, add_generation_prompt=False, clear_thinking=False)
    assert said == "[gMASK]<sop><|user|>Hi<|assistant|></think>done", "nothing was thought"
    with_tools = newer.apply_chat_template(turns[:1], tools=TOOLS)
    assert with_tools == (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "city": "Zürich"}}}\n'
        "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
        "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
        "<|user|>Hi<|assistant|><think>"
    )


def test_transformers_renders_the_newer_template_alike(newer, tmp_path):
    transformers = pytest.importorskip("transformers")
    newer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for options in ({}, {"enable_thinking": False}, {"clear_thinking": False}, {"tools": TOOLS}):
        assert newer.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True, **options
        )


@pytest.mark.parametrize(
    "model_type, turn",
    [
        ("glm4_moe", "<|user|>\nHi<|assistant|>"),
        ("glm4_moe_lite", "<|user|>Hi<|assistant|><think>"),
        ("glm_moe_dsa", "<|user|>Hi<|assistant|><think>"),
    ],
)
def test_a_checkpoint_without_a_template_gets_its_familys(tok, tmp_path, model_type, turn):
    user = [{"role": "user", "content": "Hi"}]
    Tokenizer(tok.hf).save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).chat_template is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(user) == "[gMASK]<sop>" + turn
    (tmp_path / "chat_template.jinja").write_text("mine")
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(user) == "mine"


@pytest.mark.parametrize("change", ["llama", 3, None])
def test_other_checkpoints_without_a_template_get_none(tok, tmp_path, change):
    """Of a model_type that is not GLM's, or whose vocabulary has no roles."""
    Tokenizer(tok.hf).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": change or "glm4_moe"}))
    if change is None:
        raw = json.loads(tok.hf.to_str())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|system|>"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_dir(tmp_path).chat_template is None


def test_chat_template_runs_in_a_sandbox(tok):
    evil = Tokenizer(tok.hf, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="messages"):
        evil.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="unknown role"):
        tok.apply_chat_template([{"role": "robot", "content": "x"}])
    with pytest.raises(UnsupportedError, match="no chat template"):
        Tokenizer(tok.hf).apply_chat_template([])


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10000000) }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_the_messages_error(tok, template, words):
    with pytest.raises(ValueError, match=f"^messages: the chat template fails on them: {words}"):
        Tokenizer(tok.hf, chat_template=template).apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template, words",
    [
        ("\n{% if %}", "line 2: Expected"),
        ("{{ '", "line 1: unexpected char"),
        ("{% for i in '' %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    ],
)
def test_a_template_that_is_none_is_the_checkpoints_error(tok, tmp_path, template, words):
    """Said of the file before the first chat, wherever it is, and without it at the first chat."""
    with pytest.raises(CheckpointError, match=f"^chat_template: .*{words}"):
        Tokenizer(tok.hf, chat_template=template).apply_chat_template([{"role": "user", "content": "x"}])
    tok.save(tmp_path)
    tokenizer.check_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.check_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=f"/tokenizer_config.json: .*{words}"):
        tokenizer.check_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=f"/chat_template.jinja: .*{words}") as error:
        tokenizer.check_chat_template(tmp_path)
    assert str(error.value).isprintable()


def test_variables_reach_the_template(tok):
    mine = Tokenizer(tok.hf, chat_template="{{ eos_token }} {{ effort }}")
    assert mine.apply_chat_template([], effort="high") == "<|endoftext|> high"
    assert mine.apply_chat_template([], effort="low", eos_token="end") == "end low"


@pytest.mark.parametrize("special", [True, False])
def test_text_that_is_not_unicode_is_named(tok, special):
    with pytest.raises(ValueError, match=r"lone surrogate U\+DCE9 at 3"):
        tok.encode("caf\udce9", allow_special=special)


def test_broken_directories_are_named(tok, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    tok.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="not JSON"):
        Tokenizer.from_dir(tmp_path)
    other = json.loads(tok.hf.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedError, match="byte-level"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", b"\xff", "not a tokenizer"),
        ("tokenizer_config.json", b"[]", "holds a JSON list, expected an object"),
        ("tokenizer_config.json", b'{"eos_token": 3}', "eos_token is 3, expected text"),
        ("tokenizer_config.json", b'{"eos_token": {}}', "eos_token is None, expected text"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}', "eos_token '<nope>' is not in the vocabulary"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is 3, expected text"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x', expected token ids"),
        ("generation_config.json", b'{"eos_token_id": [1, null]}', r"eos_token_id is \[1, None\]"),
        ("config.json", b'{"eos_token_id": -1}', "eos_token_id is -1, expected token ids"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
    ],
)
def test_a_broken_file_beside_it_is_named(tok, tmp_path, name, content, words):
    tok.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"decoder": None}, UnsupportedError, "byte-level"),
        ({"vocab": {"a": 0, "b": 2**32 - 1}}, CheckpointError, "a vocabulary of 4294967296, expected 1..4194304"),
        ({"vocab": {"a": 0, "\u4e2d": 1}}, CheckpointError, "token 1, '\u4e2d', is not in the byte-level alphabet"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(tok, tmp_path, change, error, words):
    raw = json.loads(tok.hf.to_str())
    if "vocab" in change:
        raw["model"].update(change, merges=[])
    else:
        raw.update(change)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=words):
        Tokenizer.from_dir(tmp_path)
