"""Payloads as output and as data: a model whose responses are scripted, and a watch on what a run does outside its folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mifo.data.chartok import CHAT_TEMPLATE, SPECIALS
from mifo.types import Rollout

PAYLOADS = json.loads((Path(__file__).parent / "payloads.json").read_text(encoding="utf-8"))
NAMES = [f"{p['category']}-{i}" for i, p in enumerate(PAYLOADS)]
RIGHT = "48271"  # no payload holds it
OPTIONS = "\nA. 1\nB. 2\nC. 3"
GRADERS = (("math", RIGHT), ("math", "x+48271"), ("exact", RIGHT), ("choice", "B"))  # the second one needs a worker
FORMS = (
    "{}",
    "so \\boxed{{{}}}",
    "\\boxed{{48271}} {} \\boxed{{{}}}",
)  # as it is, as the answer, after and as the answer
CONTEXT = 16_384


def byte_tokenizer():
    """A tokenizer that can write every string of bytes, as those of today's models can; token of byte b is 7 + b."""
    letters = bytes_to_unicode()
    vocabulary = {token: i for i, token in enumerate(SPECIALS)} | {letters[b]: 7 + b for b in range(256)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def byte_model(folder):
    """A random model over bytes in a Hugging Face folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def as_bytes(text):
    """The bytes of a response; a half of a surrogate pair becomes bytes that are no UTF-8, as a model may well write them."""
    return text.encode("utf-8", "surrogatepass")


def as_read(text):
    """What a reader of the response gets."""
    return as_bytes(text).decode("utf-8", "replace")


def payload_texts(canary):
    """The payloads with the canary's path in them."""
    return [p["text"].replace("{canary}", str(canary)) for p in PAYLOADS]


def filled(form, text):
    """A response of a form with a payload in it."""
    return form.replace("{{", "\0").replace("}}", "\1").replace("{}", text).replace("\0", "{").replace("\1", "}")


class ScriptedEngine:
    """An engine whose responses are written down: `script` gives those of each call, and starts again at its end.

    It stands where a run's own engine stands, so everything from the ids on is the run's.
    """

    def __init__(self, responses):
        self.responses = responses
        self.version = 0
        self.place = 0

    def update(self, model, version):
        self.version = version

    def generate(self, prompts, n, sampling, seed):
        """The next n responses for every prompt, with the right answer in place of the last where there are several."""
        chosen = [self.responses[(self.place + i) % len(self.responses)] for i in range(n)]
        self.place += n
        if n > 1:
            chosen[-1] = f"\\boxed{{{RIGHT}}}"
        return [tuple(self._rollout(text, sampling) for text in chosen) for _ in prompts]

    def _rollout(self, text, sampling):
        ids = (*(7 + b for b in as_bytes(text)), SPECIALS.index("<eos>"))
        assert len(ids) <= sampling.max_tokens
        return Rollout(token_ids=ids, logprobs=(-1.0,) * len(ids), stop="stop", weight_version=self.version)


class Deeds:
    """What the process did, by the interpreter's audit events: processes, connections, and files opened for writing."""

    def __init__(self):
        self.processes, self.connections, self.written = [], [], []

    def see(self, event, arguments):
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile"):
            self.processes.append((event, str(arguments)))
        elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request"):
            self.connections.append((event, str(arguments)))
        elif event == "open" and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.written.append(str(arguments[0]))


_watching: list[Deeds] = []
_hooked: list[bool] = []


def _hook(event, arguments):
    for deeds in _watching:
        deeds.see(event, arguments)


@contextlib.contextmanager
def watching():
    """The deeds of a block."""
    if not _hooked:  # a hook cannot be taken off again
        sys.addaudithook(_hook)
        _hooked.append(True)
    deeds = Deeds()
    _watching.append(deeds)
    try:
        yield deeds
    finally:
        _watching.remove(deeds)


STYLE = re.compile(r"\x1b\[[0-9;]*m")


def without_style(shown):
    """Terminal output without the colours that the display itself sets."""
    return STYLE.sub("", shown)
