"""Templates over any text: prompts are prefixes, text comes back, and nothing of a problem is evaluated or lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mifo.data.chartok import CHARACTERS, SPECIALS, char_tokenizer
from mifo.data.chat import THINK, Chat
from mifo.errors import DataError
from mifo.types import Message, Problem

TOKENIZER = char_tokenizer()
CHATS = {name: Chat(TOKENIZER, name) for name in ("tokenizer", "luffy", "qwen", "prime", "none")}
TEMPLATES = st.sampled_from(sorted(CHATS))
PLAIN = st.text(alphabet=[c for c in CHARACTERS if c != "<"], min_size=1, max_size=60)
JINJA = st.sampled_from(["{{ 7*7 }}", "{% if x %}", "{# x #}", "{{ messages }}", "{% raw %}", "{{ bos_token }}"])
ANY = st.text(max_size=60)


def asked(text):
    return Problem(id="p", messages=(Message("user", text),), answer="1")


@settings(deadline=None)
@given(TEMPLATES, st.one_of(PLAIN, JINJA, st.tuples(PLAIN, JINJA, PLAIN).map("".join)))
def test_a_problem_stands_in_its_prompt_word_for_word(name, text):
    chat = CHATS[name]
    assert text in chat.render(asked(text))
    assert TOKENIZER.decode(list(chat.prompt_ids(asked(text)))) == chat.render(asked(text))


@settings(deadline=None)
@given(TEMPLATES, PLAIN, PLAIN)
def test_prompts_differ_only_where_problems_do(name, one, other):
    """What stands before and after the problem is the same for every problem."""
    first, second = (CHATS[name].render(asked(text)) for text in (one, other))
    before, after = first.split(one, 1) if one != other and first.count(one) == 1 else (None, None)
    if before is not None and second.startswith(before):
        assert second == before + other + after


@settings(deadline=None)
@given(TEMPLATES, PLAIN)
def test_a_demonstration_comes_back_and_ends_once(name, text):
    chat = CHATS[name]
    ids = chat.demonstration_ids(text)
    assert ids[-1] == TOKENIZER.eos_token_id
    assert not set(ids[:-1]) & set(chat.stop_ids)
    whole = chat.prompt_ids(asked("1")) + ids
    assert whole[: len(whole) - len(ids)] == chat.prompt_ids(asked("1"))
    assert chat.decode(ids).removeprefix(THINK if chat.opens_thought else "") == text


@settings(deadline=None)
@given(TEMPLATES, ANY, st.lists(st.sampled_from(SPECIALS), max_size=3))
def test_any_text_is_encoded_or_refused(name, text, specials):
    chat, text = CHATS[name], text + "".join(specials)
    try:
        ids = chat.demonstration_ids(text)
    except DataError as error:
        if "no tokens" not in str(error) and "holds the stop token" not in str(error):
            raise
        return
    assert not set(ids[:-1]) & set(chat.stop_ids)


def test_turns_that_no_template_holds_are_refused():
    twice = Problem(id="p", messages=(Message("user", "1"), Message("user", "2")), answer="1")
    for name in ("luffy", "qwen", "prime", "none"):
        with pytest.raises(DataError, match="holds one user turn"):
            CHATS[name].render(twice)
