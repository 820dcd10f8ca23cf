"""Texts that end a response, as its end token does (Open-Reasoner-Zero samples up to `</answer>`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.errors import ConfigError
from mifo.types import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTIAL = "\ufffd"  # what a token of a part of a character decodes to


class StopTexts:
    """Says of the tokens of a response whether one of some texts is complete with the last of them.

    A text may begin and end inside tokens, and the same text may be made of other tokens each time, so it is looked for in what
    the tokens decode to. `last_ids` are the tokens that can complete one, so that others need not be decoded. Tokens are decoded
    behind another one, since some tokenizers drop the blank before the first.

    Args:
        tokenizer: whose tokens the responses are made of.
        texts: one or more, none empty.

    Raises:
        ConfigError: a text holds a special token, which responses are read without, or no token can complete it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        self._check_special()
        self._first = list(tokenizer("x", add_special_tokens=False)["input_ids"])
        self._skip = len(self._plain(self._first))
        self._tail = 1 + max(len(text.encode()) for text in texts)  # a token is at least a byte
        words = [self._decode([i]) for i in range(len(tokenizer))]
        found: set[int] = set()
        for text in self._texts:
            end = text[-1]
            own = {i for i, word in enumerate(words) if end in word or (PARTIAL in word and not end.isascii())}
            if not own:
                raise ConfigError(
                    f"rollout.stop_texts holds {text!r}, which no token of the tokenizer can complete: it would never end a "
                    "response. Leave it out."
                )
            found |= own
        self.last_ids: TokenIds = tuple(sorted(found))

    def _check_special(self) -> None:
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        for text in self._texts:
            held = next((token for token in special if token in text), None)
            if held is not None:
                raise ConfigError(
                    f"rollout.stop_texts holds {text!r}, in which {held!r} is a special token: responses are read without these, "
                    "so it would never end one. End tokens of model and template end responses anyway; leave it out."
                )

    def __call__(self, token_ids: Sequence[int]) -> bool:
        """Whether the response ends with the last of its tokens so far."""
        tail = self._decode(token_ids[-self._tail :])
        return any(text in tail for text in self._texts)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._plain([*self._first, *ids])[self._skip :]

    def _plain(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
