"""Templates, ids and their inverse, with a character tokenizer so that every id can be read."""

import pytest
from transformers import AutoTokenizer

from mifo.data.chartok import CHARACTERS, SPECIALS, char_tokenizer
from mifo.data.chat import LUFFY_SYSTEM, PRIME_SYSTEM, QWEN_SYSTEM, THINK, Chat
from mifo.errors import ConfigError, DataError, ModelError
from mifo.types import Message, Problem

TEMPLATES = ("tokenizer", "luffy", "qwen", "prime", "none")


@pytest.fixture
def tokenizer():
    return char_tokenizer()


def asked(*turns):
    return Problem(id="p", messages=turns or (Message("user", "3+4="),), answer="7")


WITH_SYSTEM = asked(Message("system", "Data."), Message("user", "3+4="))


def test_the_character_tokenizer_round_trips(tokenizer, tmp_path):
    text = CHARACTERS + "  two  spaces , and a'comma n't"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) == len(SPECIALS) + len(CHARACTERS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert Chat(loaded).prompt_ids(WITH_SYSTEM) == Chat(tokenizer).prompt_ids(WITH_SYSTEM)
    assert Chat(loaded).stop_ids == Chat(tokenizer).stop_ids


def test_rendered_prompts_word_for_word(tokenizer):
    def rendered(template):
        return Chat(tokenizer, template).render(asked())

    assert rendered("tokenizer") == "<bos><user>3+4=<assistant>"
    assert rendered("none") == "3+4="
    assert rendered("luffy") == f"{LUFFY_SYSTEM}\nUser: This is the problem:\n3+4=\nAssistant: <think>\n"
    assert rendered("qwen") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n3+4=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered("prime") == (
        f"{PRIME_SYSTEM} User: 3+4=\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}. Assistant:"
    )
    assert LUFFY_SYSTEM.startswith("Your task is to follow a systematic, thorough reasoning process")
    assert '"<think>\n {thoughts} </think>\n". Each' in LUFFY_SYSTEM


def test_which_system_turn_is_used(tokenizer):
    assert Chat(tokenizer).render(WITH_SYSTEM) == "<bos><system>Data.<user>3+4=<assistant>"
    given = Chat(tokenizer, system_prompt="Mine.")
    assert given.render(WITH_SYSTEM) == given.render(asked()) == "<bos><system>Mine.<user>3+4=<assistant>"
    for template, own in (("luffy", LUFFY_SYSTEM), ("qwen", QWEN_SYSTEM), ("prime", PRIME_SYSTEM)):
        plain = Chat(tokenizer, template).render(WITH_SYSTEM)
        assert own in plain
        assert "Data." not in plain
        assert Chat(tokenizer, template, "Mine.").render(WITH_SYSTEM) == plain.replace(own, "Mine.")
    assert Chat(tokenizer, "none").render(WITH_SYSTEM) == "3+4="


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_a_prefix_of_the_whole_and_the_response_ends_in_eos_once(tokenizer, template):
    chat = Chat(tokenizer, template)
    prompt, response = chat.prompt_ids(asked()), chat.demonstration_ids("It is \\boxed{7}")
    whole = prompt + response
    assert whole[: len(prompt)] == prompt
    assert response.count(tokenizer.eos_token_id) == 1
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(list(prompt)) == chat.render(asked())
    assert chat.decode(response).removeprefix(THINK) == "It is \\boxed{7}"


def merging_tokenizer():
    """A tokenizer with the merge "=" + "7", which joins the end of this prompt to the start of this response."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(["<eos>", "<unk>", *"0123456789+=", "=7"])}
    core = Tokenizer(models.BPE(vocabulary, [("=", "7")], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def test_prompt_and_response_are_tokenised_apart():
    """Tokenising the joined text would merge across the border, and the prompt would be no prefix."""
    merging = merging_tokenizer()
    chat = Chat(merging, "none")
    prompt, response = chat.prompt_ids(asked()), chat.demonstration_ids("7")
    joined = tuple(merging("3+4=7", add_special_tokens=False)["input_ids"])
    assert joined[: len(prompt)] != prompt
    assert prompt == tuple(merging.convert_tokens_to_ids(list("3+4=")))
    assert response == (merging.convert_tokens_to_ids("7"), merging.eos_token_id)


def test_luffy_prompts_open_the_thought_and_text_joins_on(tokenizer):
    luffy, plain = Chat(tokenizer, "luffy"), Chat(tokenizer)
    assert (luffy.opens_thought, plain.opens_thought) == (True, False)
    trace = "<think>\nWell.</think>\n\\boxed{7}"
    assert luffy.demonstration_ids(trace) == luffy.demonstration_ids(trace.removeprefix(THINK))
    assert luffy.decode(luffy.demonstration_ids(trace)) == trace
    assert plain.decode(plain.demonstration_ids(trace)) == trace  # not opened by the prompt: nothing dropped or added


def test_a_tokenizer_template_that_opens_the_thought_is_noticed(tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    chat = Chat(tokenizer)
    assert chat.opens_thought
    assert chat.decode(chat.demonstration_ids("<think>\nA.</think>7")) == "<think>\nA.</think>7"


def test_decode_drops_special_tokens_only(tokenizer):
    chat = Chat(tokenizer)
    ids = tokenizer("<assistant>a  b ,<user><pad><eos>", add_special_tokens=False)["input_ids"]
    assert chat.decode(ids) == "a  b ,"
    assert chat.decode(()) == ""


def test_stop_ids_are_eos_generation_eos_and_the_end_of_turn(tokenizer):
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert Chat(tokenizer, "none").stop_ids == (eos,)
    assert Chat(tokenizer, "none", generation_eos=[eos, pad]).stop_ids == tuple(sorted((eos, pad)))
    assert Chat(tokenizer, "none", generation_eos=pad).stop_ids == tuple(sorted((eos, pad)))
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "\n<system>")  # ends a turn with another special
    system = tokenizer.convert_tokens_to_ids("<system>")
    assert Chat(tokenizer).stop_ids == tuple(sorted((eos, system)))
    assert Chat(tokenizer, "luffy").stop_ids == (eos,)
    assert Chat(tokenizer).demonstration_ids("7")[-1] == eos


def test_qwen_stops_at_im_end_when_it_is_one_token(tokenizer):
    assert Chat(tokenizer, "qwen").stop_ids == (tokenizer.eos_token_id,)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Chat(tokenizer, "qwen").stop_ids == tuple(sorted((tokenizer.eos_token_id, end)))


def test_a_beginning_of_sequence_is_added_only_where_the_tokenizer_adds_it(tokenizer):
    from tokenizers import processors

    bos = tokenizer.bos_token_id
    assert Chat(tokenizer, "none").prompt_ids(asked())[0] != bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    plain = Chat(tokenizer, "none").prompt_ids(asked())
    assert plain[0] == bos
    assert plain.count(bos) == 1
    assert Chat(tokenizer).prompt_ids(asked()).count(bos) == 1  # the chat template has written it already
    assert bos not in Chat(tokenizer).demonstration_ids("7")


def test_an_end_token_in_the_text_is_not_doubled_and_not_allowed_inside(tokenizer):
    chat = Chat(tokenizer)
    assert chat.demonstration_ids("7<eos>") == chat.demonstration_ids("7")
    with pytest.raises(DataError, match="stop token '<eos>' inside"):
        chat.demonstration_ids("7<eos>8")
    with pytest.raises(DataError, match="no tokens"):
        chat.demonstration_ids("<eos>")


def test_a_tokenizer_without_a_chat_template_says_what_to_do(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template; choose template 'luffy'"):
        Chat(tokenizer)
    assert Chat(tokenizer, "none").render(asked()) == "3+4="


def test_mistakes_are_errors_of_the_right_kind(tokenizer):
    with pytest.raises(ConfigError, match="template = 'qwem'"):
        Chat(tokenizer, "qwem")
    with pytest.raises(ConfigError, match="'none' is the bare problem"):
        Chat(tokenizer, "none", "Mine.")
    turns = asked(Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
    assert Chat(tokenizer).render(turns) == "<bos><user>1<assistant>2<eos><user>3<assistant>"
    with pytest.raises(DataError, match="template 'luffy' holds one user turn"):
        Chat(tokenizer, "luffy").render(turns)
    with pytest.raises(DataError, match="no tokens"):
        Chat(tokenizer, "none").prompt_ids(asked(Message("user", "")))
    no_eos = char_tokenizer()
    no_eos.eos_token = None
    with pytest.raises(ModelError, match="no eos_token"):
        Chat(no_eos, "none")


def test_a_chat_template_that_refuses_a_role_is_named(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ModelError, match="refuses the turns system, user: no system role"):
        Chat(tokenizer).render(WITH_SYSTEM)
