"""TextStream: for every split the pieces joined are the text up to the first stop string; nothing leaks or lags."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.data import tokenizer as tokenizers
from glmx.serve.sampling import SamplingParams
from glmx.serve.text import TextStream

# Few different characters, so that stop strings are found, nearly found, and overlap; one to four bytes each.
LETTERS = "abé€𝄞"
TOKENIZER = tokenizers.train(["abab aab baé éé €a 𝄞𝄞 ab𝄞" * 20], 290)
PADDING = [TOKENIZER.vocab_size, TOKENIZER.vocab_size + 3]

texts = st.text(LETTERS, max_size=40)
# Whole characters, lone bytes of them, special tokens, and rows beyond the vocabulary.
ids = texts.map(TOKENIZER.encode) | st.lists(
    st.integers(0, TOKENIZER.vocab_size - 1) | st.sampled_from([*TOKENIZER.encode(LETTERS), *PADDING]), max_size=30
)
stops = st.lists(st.text(LETTERS + "\ufffd", min_size=1, max_size=5), max_size=4)


def safe(text, stop_strings, include):
    """(what may be shown of a text that may grow, the stop string that ended it): by the definition, slowly."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    begun = [n for stop in stop_strings for n in range(len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(begun, default=0)], None


def complete(token_ids):
    """The text of the characters that are complete."""
    return TOKENIZER.detokenizer().push([i for i in token_ids if i < TOKENIZER.vocab_size])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(token_ids=ids, stop=stops, include=st.booleans(), data=st.data())
def test_pieces_join_to_the_text_for_every_split(token_ids, stop, include, data):
    stream = TextStream(TOKENIZER, SamplingParams(stop=stop, include_stop_str_in_output=include))
    shown, rest = "", list(token_ids)
    while rest:
        n = data.draw(st.integers(1, 4))
        shown += stream.push(rest[:n])
        rest = rest[n:]
        so_far = token_ids[: len(token_ids) - len(rest)]
        assert (shown, stream.stop_reason) == safe(complete(so_far), stop, include)
    shown += stream.flush()
    full = TOKENIZER.decode([i for i in token_ids if i < TOKENIZER.vocab_size], skip_special_tokens=True)
    text, found = safe(full, stop, include)
    assert stream.stop_reason == found
    assert shown == (full if found is None else text)


@pytest.mark.parametrize(
    "stop, text, shown, found",
    [
        (["ab"], "aab", "a", "ab"),
        (["aab"], "aaab", "a", "aab"),  # a match that begins inside a failed one
        (["abab"], "ababab", "", "abab"),
        (["abcd", "bc"], "abcd", "a", "bc"),  # the first to be complete, though the other began before it
        (["abc", "bc"], "abc", "", "abc"),  # complete together: the longer
        (["b", "b"], "ab", "a", "b"),
        (["é"], "aéb", "a", "é"),
        (["abc"], "ab", "ab", None),  # begun and never finished
    ],
)
def test_which_stop_string_ends_a_text(stop, text, shown, found):
    ids = TOKENIZER.encode(text)
    for pushes in ([ids], [[i] for i in ids]):
        stream = TextStream(TOKENIZER, SamplingParams(stop=stop))
        assert "".join(stream.push(push) for push in pushes) + stream.flush() == shown
        assert stream.stop_reason == found
        assert stream.push(TOKENIZER.encode("more")) == ("" if found else "more") and stream.flush() == ""


def test_a_beginning_is_held_back_until_it_is_none():
    stream = TextStream(TOKENIZER, SamplingParams(stop="abba"))
    pieces = [stream.push(TOKENIZER.encode(text)) for text in ("é", "a", "b", "b", "€", "a")]
    assert pieces == ["é", "", "", "", "abb€", ""] and stream.flush() == "a"


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, SamplingParams())
    assert stream.push([1, 2]) == stream.flush() == "" and stream.token_text(1) is None


def test_tokens_by_themselves():
    stream = TextStream(TOKENIZER, SamplingParams())
    assert stream.token_text(TOKENIZER.eos_id) == "<|endoftext|>"
    assert stream.token_text(TOKENIZER.encode("a")[0]) == "a"
    assert stream.token_text(TOKENIZER.vocab_size) == ""
