"""TextStream: the text of one growing sequence, piece by piece, never more than is safe to show.

Two things are held back: the bytes of a character that is not complete, and characters that may be the
beginning of a stop string. Both come out as soon as it is known what they are, at the latest with `flush`.
"""

from __future__ import annotations

from collections.abc import Iterable

from glmx.data.tokenizer import Tokenizer
from glmx.serve.sampling import SamplingParams


class TextStream:
    """Turns token ids into text and ends it at the first stop string.

    The text is read character by character, and the first stop string to be complete ends it (of several
    that end with the same character, the longest). So the pieces joined do not depend on how many tokens
    each push brings. Special tokens have no text; without a tokenizer nothing has.

    stop_reason  the stop string that was found; from then on every piece is empty
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._stops = [_Matcher(stop) for stop in params.stop]
        self._include_stop = params.include_stop_str_in_output
        self._held = ""
        self.stop_reason: str | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became safe to show with these tokens; often empty, or that of earlier ones."""
        if self._tokenizer is None or self._detokenizer is None:
            return ""
        # Rows that pad an embedding beyond the tokenizer's vocabulary stand for no text.
        known = [i for i in token_ids if i < self._tokenizer.vocab_size]
        return self._take(self._detokenizer.push(known))

    def flush(self) -> str:
        """The rest, as no token follows. A character that stayed incomplete becomes U+FFFD."""
        if self._detokenizer is None:
            return ""
        piece = self._take(self._detokenizer.flush()) + self._held
        self._held = ""
        return piece

    def token_text(self, token_id: int) -> str | None:
        """One token by itself, special ones by name, U+FFFD for parts of a character; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token_id]) if token_id < self._tokenizer.vocab_size else ""

    def _take(self, text: str) -> str:
        if self.stop_reason is not None:
            return ""
        if not self._stops:
            return text
        for place, character in enumerate(text):
            found = [stop.text for stop in self._stops if stop.push(character)]
            if found:
                self.stop_reason = max(found, key=len)
                shown = self._held + text[: place + 1]
                self._held = ""
                return shown if self._include_stop else shown[: -len(self.stop_reason)]
        held = max(stop.matched for stop in self._stops)
        shown = self._held + text
        cut = len(shown) - held
        self._held = shown[cut:]
        return shown[:cut]


class _Matcher:
    """Knuth-Morris-Pratt: how much of a stop string the characters so far end with, in constant time each."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # back[n]: of text[:n], the longest proper prefix that is also its end.
        self._back = [0] * (len(text) + 1)
        for n in range(1, len(text)):
            self._back[n + 1] = self._longer(self._back[n], text[n])

    def push(self, character: str) -> bool:
        """Whether the stop string is complete with this character. Not to be called after that."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.text)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._back[matched]
        return matched + (self.text[matched] == character)
