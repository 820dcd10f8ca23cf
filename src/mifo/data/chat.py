"""From a problem to prompt ids, and from ids back to text: the chat templates of the field's reasoning experiments.

Templates (wording: S0 figure 8, S2 appendix E, and the evaluation script of LUFFY, which differ in detail; where they
do, the script that produced the published numbers is followed):

- "tokenizer"  the tokenizer's own chat template with a generation prompt.
- "luffy"      LUFFY's instruction, `User: This is the problem:`, `Assistant: <think>`: the response is mid-thought.
- "qwen"       `<|im_start|>` turns with the system text of Qwen2.5-Math.
- "prime"      one paragraph about `<think>` and `<answer>` tags, `User: ...`, `Assistant:`.
- "none"       the bare text of the problem.

System turns. An explicit `system_prompt` always stands in for the template's own and for one that the data brought.
Without it, "tokenizer" keeps the data's system turn (or the template's own default); the other templates drop it, as
LUFFY's evaluation does, since they bring their own wording.

Prompt and response are tokenised apart, so the prompt's ids are a prefix of the whole by construction. Not covered:
tools, images, several turns outside "tokenizer", and label masks (a response is trained on whole).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from mifo.data.stops import StopTexts
from mifo.errors import ConfigError, DataError, ModelError
from mifo.types import Message, Problem, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["tokenizer", "luffy", "qwen", "prime", "none"]
THINK = "<think>\n"

LUFFY_SYSTEM = (
    "Your task is to follow a systematic, thorough reasoning process before providing the final solution. This "
    "involves analyzing, summarizing, exploring, reassessing, and refining your thought process through multiple "
    "iterations. Structure your response into two sections: Thought and Solution. In the Thought section, present your "
    'reasoning using the format: "<think>\n {thoughts} </think>\n". Each thought should include detailed analysis, '
    'brainstorming, verification, and refinement of ideas. After "</think>\n," in the Solution section, provide the '
    "final, logical, and accurate answer, clearly derived from the exploration in the Thought section. If applicable, "
    "include the answer in \\boxed{} for closed-form results like multiple choices or mathematical solutions."
)
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PRIME_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)
PRIME_SUFFIX = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"


@dataclass(frozen=True)
class Chat:
    """A tokenizer with one template.

    `generation_eos` is `generation_config.eos_token_id` as the model has it (None, one id or several). Raises
    ConfigError for an unknown template or a system prompt that "none" has no place for, ModelError for a tokenizer
    without an end-of-sequence token or, with "tokenizer", without a chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: TemplateName = "tokenizer"
    system_prompt: str | None = None
    generation_eos: int | Sequence[int] | None = None
    append_end: bool = True  # a demonstration ends with the tokenizer's eos; false is legacy (PSFT)
    stop_texts: Sequence[str] = ()  # texts that end a response too
    ends_text: StopTexts | None = field(init=False)
    stop_ids: TokenIds = field(init=False)  # sorted: the tokenizer's eos, generation_eos, the template's end of turn
    opens_thought: bool = field(init=False)  # the rendered prompt ends in "<think>\n"

    def __post_init__(self) -> None:
        if self.template not in get_args(TemplateName):
            raise ConfigError(f"template = {self.template!r}: unknown; give one of {', '.join(get_args(TemplateName))}")
        if self.template == "none" and self.system_prompt is not None:
            raise ConfigError(
                f"system_prompt = {self.system_prompt!r}: template 'none' is the bare problem and has no system turn; "
                f"remove it or choose template 'tokenizer'"
            )
        if self.template == "tokenizer" and self.tokenizer.chat_template is None:
            raise ModelError(
                f"template = 'tokenizer': the tokenizer {self.tokenizer.name_or_path!r} has no chat template; choose "
                f"template 'luffy', 'qwen', 'prime' or 'none', or save one with the tokenizer"
            )
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no eos_token, so no response could end; set one"
            )
        probe = Problem(id="probe", messages=(Message("user", "1"),), answer="1")
        object.__setattr__(self, "opens_thought", self.render(probe).endswith(THINK))
        object.__setattr__(self, "stop_ids", self._find_stop_ids())
        object.__setattr__(self, "ends_text", StopTexts(self.tokenizer, self.stop_texts) if self.stop_texts else None)

    def render(self, problem: Problem) -> str:
        """The prompt as text, up to where the response starts.

        Raises DataError when a template for one question meets a conversation of several turns.
        """
        if self.template == "tokenizer":
            return self._apply([turn._asdict() for turn in self._turns(problem)], open_response=True)
        question = _single_question(problem, self.template)
        if self.template == "luffy":
            system = LUFFY_SYSTEM if self.system_prompt is None else self.system_prompt
            return f"{system}\nUser: This is the problem:\n{question}\nAssistant: {THINK}"
        if self.template == "qwen":
            system = QWEN_SYSTEM if self.system_prompt is None else self.system_prompt
            return (
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
                f"<|im_start|>assistant\n"
            )
        if self.template == "prime":
            system = PRIME_SYSTEM if self.system_prompt is None else self.system_prompt
            return f"{system} User: {question}{PRIME_SUFFIX}. Assistant:"
        return question

    def prompt_ids(self, problem: Problem) -> TokenIds:
        """Ids of the rendered prompt; never empty.

        A chat template writes its own special tokens. For the other templates the tokenizer's beginning-of-sequence id
        is put in front if it is one that the tokenizer adds to plain text.
        """
        ids = self._ids(self.render(problem))
        if self.template != "tokenizer":
            ids = self._leading_bos() + ids
        if not ids:
            raise DataError(f"problem {problem.id!r}: its prompt has no tokens; remove it or choose another template")
        return ids

    def demonstration_ids(self, text: str) -> TokenIds:
        """Ids of a demonstration as a response: no special tokens added, the tokenizer's eos at the end, once (see `append_end`).

        A leading `<think>\\n` is dropped when the prompt already ends in it. Raises DataError for an empty text and for
        one that holds a stop token before its end, after which nothing could be sampled.
        """
        if self.opens_thought:
            text = text.removeprefix(THINK)
        ids = self._ids(text)
        while ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        if not ids:
            raise DataError(f"demonstration {text[:60]!r}: no tokens; remove it from the data")
        inner = [i for i in ids if i in self.stop_ids]
        if inner:
            token = self.tokenizer.convert_ids_to_tokens(inner[0])
            raise DataError(f"demonstration {text[:60]!r}...: holds the stop token {token!r} inside; remove the token")
        self._check_stop_texts(text.rstrip())
        return (*ids, self.tokenizer.eos_token_id) if self.append_end else ids

    def _check_stop_texts(self, text: str) -> None:
        for stop in self.stop_texts:
            end = text.find(stop) + len(stop)
            if stop in text and end < len(text):
                raise DataError(
                    f"demonstration {text[:60]!r}...: holds the stop text {stop!r} before its end; remove it"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response without special tokens, with the `<think>\\n` that its prompt holds put in front."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return THINK + text if self.opens_thought else text

    def _turns(self, problem: Problem) -> tuple[Message, ...]:
        if self.system_prompt is None:
            return problem.messages
        others = tuple(turn for turn in problem.messages if turn.role != "system")
        return (Message("system", self.system_prompt), *others)

    def _apply(self, turns: list[dict[str, str]], *, open_response: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_response))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise ModelError(
                f"template = 'tokenizer': the chat template of {self.tokenizer.name_or_path!r} refuses the turns "
                f"{roles}: {error}; change the system prompt or the data, or choose another template"
            ) from error

    def _ids(self, text: str) -> TokenIds:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _leading_bos(self) -> TokenIds:
        bos = self.tokenizer.bos_token_id
        added = self.tokenizer("")["input_ids"]
        return (bos,) if bos is not None and added[:1] == [bos] else ()

    def _find_stop_ids(self) -> TokenIds:
        stops = {self.tokenizer.eos_token_id}
        if isinstance(self.generation_eos, int):
            stops.add(self.generation_eos)
        elif self.generation_eos is not None:
            stops.update(self.generation_eos)
        if self.template == "qwen":
            end_of_turn = self._ids("<|im_end|>")
            stops.update(end_of_turn if len(end_of_turn) == 1 else ())
        if self.template == "tokenizer":
            stops.update(self._template_end_of_turn())
        return tuple(sorted(stops))

    def _template_end_of_turn(self) -> set[int]:
        """The special token, if any, that the chat template writes right after an assistant turn."""
        mark = "zq"  # rendered verbatim by every template, and unlikely in a template's own text
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": mark}]
        following = self._ids(self._apply(turns, open_response=False).rpartition(mark)[2].lstrip())
        added = self.tokenizer.added_tokens_decoder
        return {i for i in following[:1] if i in added and added[i].special}


def _single_question(problem: Problem, template: str) -> str:
    turns = [turn for turn in problem.messages if turn.role != "system"]
    if len(turns) != 1 or turns[0].role != "user":
        roles = ", ".join(turn.role for turn in problem.messages)
        raise DataError(
            f"problem {problem.id!r}: template {template!r} holds one user turn, its turns are {roles}; choose "
            f"template 'tokenizer'"
        )
    return turns[0].content
