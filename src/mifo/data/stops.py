"""Texts that end a response, as its end token does (Open-Reasoner-Zero samples up to `</answer>`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.types import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "\ufffd"  # what a token of a part of a character decodes to


class StopTexts:
    """Says of the tokens of a response whether one of some texts is complete with the last of them.

    A text may begin and end inside tokens, and the same text may be made of other tokens each time, so it is looked for in what
    the tokens decode to. `last_ids` are the tokens that can complete one, so that others need not be decoded.

    Args:
        tokenizer: whose tokens the responses are made of.
        texts: one or more, none empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        self._tail = 1 + max(len(text.encode()) for text in texts)  # a token is at least a byte
        ends = {text[-1] for text in texts}
        whole_only = all(end.isascii() for end in ends)
        words = [self._decode([i]) for i in range(len(tokenizer))]
        self.last_ids: TokenIds = tuple(
            i for i, word in enumerate(words) if ends & set(word) or (PARTIAL in word and not whole_only)
        )

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Whether the response ends with the last of its tokens so far."""
        tail = self._decode(token_ids[-self._tail :])
        return any(text in tail for text in self._texts)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
