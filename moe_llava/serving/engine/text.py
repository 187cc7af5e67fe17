"""Decode a completion token by token: a character or a stop string may consist of several tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # a decoder's output for bytes that are not, or not yet, a character


class Detokenizer:
    """Convert tokens to pieces of text that never change afterwards. Spaces before the first word belong to the chat template.

    `stop`: strings that end the completion, none of them empty. They are no part of the text. `stopped`: one was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        # The last piece is decoded again with the new tokens: the text of a token depends on the one before it.
        self._last, self._new = 0, 0
        self._held = ""  # may be the beginning of a stop string
        self._started = False

    def add(self, token: int) -> str:
        """Return the text that is final now, often that of one token."""
        self._tokens.append(token)
        text = self._undecoded()
        if not text or text.endswith(REPLACEMENT):  # a special token, or a part of a character
            return ""
        self._last, self._new = self._new, len(self._tokens)
        return self._emit(text)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        rest = self._emit(self._undecoded()) + self._held
        self._last, self._new, self._held = self._new, len(self._tokens), ""
        return rest

    def _undecoded(self) -> str:
        before = self._decode(self._tokens[self._last : self._new])
        return self._decode(self._tokens[self._last :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _emit(self, text: str) -> str:
        """Return the part of `text` that cannot belong to a stop string, and hold back the rest."""
        text = self._held + text
        text = text if self._started else text.lstrip(" ")
        self._started = self._started or bool(text)
        positions = [text.find(stop) for stop in self._stop if stop in text]
        if positions:
            self.stopped, self._held = True, ""
            return text[: min(positions)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` are the first of `stop`, but not all of it."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
