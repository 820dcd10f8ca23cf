"""Texts that end a response: found with the token that completes them, however they are cut into tokens."""

import random
from typing import ClassVar

import pytest
from transformers import AutoTokenizer

from mifo.data.chartok import char_tokenizer
from mifo.data.chat import Chat
from mifo.data.stops import StopTexts
from mifo.errors import ConfigError, DataError
from mifo.train.embedded import embedded_model_folder


@pytest.fixture(scope="module")
def byte_pairs():
    return AutoTokenizer.from_pretrained(embedded_model_folder())


def first_end(tokenizer, ids, texts):
    """The oracle: the least number of tokens whose whole text holds one of the texts."""
    for count in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if any(text in whole for text in texts):
            return count
    return None


def found_end(stops, ids):
    """As an engine asks: after each token that can complete a text, and no other."""
    for count, token in enumerate(ids, start=1):
        if token in stops.last_ids and stops(ids[:count]):
            return count
    return None


@pytest.mark.parametrize("texts", [("</answer>",), ("\n\n", "Q:"), ("é!", "ß"), ("猫",), (" end",)])
def test_the_end_is_where_the_whole_text_first_holds_it(byte_pairs, texts):
    """Over texts cut by the tokenizer, and over the same cut into pieces of every size, whose tokens are others."""
    draw = random.Random(3)
    stops, ended = StopTexts(byte_pairs, texts), 0
    for _ in range(60):
        pieces = draw.choices(
            [*texts, "<", "</", "answer", "an", ">", " the", "é", "猫", "\n", "Q", " 12+3", " end "], k=12
        )
        ids = [i for piece in pieces for i in byte_pairs(piece, add_special_tokens=False)["input_ids"]]
        for tokens in (ids, byte_pairs("".join(pieces), add_special_tokens=False)["input_ids"]):
            expected = first_end(byte_pairs, tokens, texts)
            assert found_end(stops, tokens) == expected
            ended += expected is not None
    assert ended > 20


def test_few_tokens_can_complete_a_text(byte_pairs):
    assert 0 < len(StopTexts(byte_pairs, ("</answer>",)).last_ids) < len(byte_pairs) // 20


def test_a_chat_has_them_only_where_it_was_given_some():
    tokenizer = char_tokenizer()
    assert Chat(tokenizer).ends_text is None
    ends = Chat(tokenizer, stop_texts=("7.", "+")).ends_text
    ids = tokenizer("3*7.", add_special_tokens=False)["input_ids"]
    assert [ends(ids[:count]) for count in (1, 2, 3, 4)] == [False, False, False, True]


def test_a_text_that_could_never_end_a_response_is_refused(byte_pairs):
    with pytest.raises(ConfigError, match=r"'<\|im_end\|>' is a special token"):
        StopTexts(byte_pairs, ("ok", "<|im_end|>\n"))
    with pytest.raises(ConfigError, match="no token of the tokenizer can complete"):
        StopTexts(char_tokenizer(), ("日本",))


class Stripping:
    """A tokenizer that drops the blank before the first token, as those of SentencePiece do."""

    words = (" a", ":", " ", " foo", "x")
    added_tokens_decoder: ClassVar = {}

    def __len__(self):
        return len(self.words)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.words.index(text)]}

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_blanks_that_a_tokenizer_drops_in_front_are_seen():
    colon = StopTexts(Stripping(), (": ",))
    assert set(colon.last_ids) == {0, 2, 3}
    assert colon([4, 1, 2])
    assert not colon([4, 2])
    assert StopTexts(Stripping(), (" foo",))([3])  # as the first token


def test_a_demonstration_that_goes_on_behind_a_stop_text_is_none():
    chat = Chat(char_tokenizer(), stop_texts=("7.",))
    assert chat.demonstration_ids("3+4=7.")[-1] == chat.tokenizer.eos_token_id
    assert chat.demonstration_ids("3+4=7.\n")
    with pytest.raises(DataError, match=r"holds the stop text '7\.' before its end"):
        chat.demonstration_ids("3+4=7. Yes.")
