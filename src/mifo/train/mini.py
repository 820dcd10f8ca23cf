"""The model `mini`: where it lies in the package, and how it was made.

    python -m mifo.train.mini FOLDER

A Qwen2 of 155 thousand weights that reads and writes characters, pretrained for about three minutes. It stands for a base model:

- Two kinds of questions (`ASKED`) it knows with their steps, mostly right, and answers in one of four formats by chance, of
  which the box that rewards ask for is one. RL can make that sure.
- Subtracting and spelling backwards it has seen only as loose lines, calculations and words, never as questions. RL finds
  nothing to reward there; demonstrations teach it.

The same machine and version of torch make the same bits again.

Shapes: B sequences of a batch, L padded length, N response tokens.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mifo.data import tasks
from mifo.data.chartok import char_tokenizer
from mifo.train.device import set_up_cpu
from mifo.types import Problem

MINI = "mini"
MINI_FOLDER = Path(__file__).resolve().parent.parent / "models" / MINI

ASKED = ("chain_add", "letter_count")
FORMATS = ("{steps}\nAnswer: {answer}", "{steps}\nSo {answer}.", "{steps}\n= {answer}", "{steps}\n\\boxed{{{answer}}}")
SHARES = (0.25, 0.25, 0.25, 0.25)
KINDS = {"question": 0.5, "calculation": 0.3, "letters": 0.2}
STEPS, WARMUP, BATCH, RATE, FLOOR = 800, 100, 64, 4e-3, 0.1

Example = tuple[str, str]  # question and response


def random_model(seed: int) -> Qwen2ForCausalLM:
    """The architecture with random weights."""
    tokenizer = char_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def pretrain(steps: int = STEPS, seed: int = 0, *, log_every: int = 100) -> Qwen2ForCausalLM:
    """Train a random model on questions in mixed formats, calculations and spelled words.

    Args:
        steps: updates of `BATCH` examples; the rate rises for the first and falls linearly to the end.
        seed: of weights and examples.
        log_every: steps between printed losses (nats a token).
    """
    model, corpus = random_model(seed), _Corpus(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    tokenizer = char_tokenizer()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1.0 - (1.0 - FLOOR) * step / steps)
        loss = _loss(model, [_encode(tokenizer, corpus.draw()) for _ in range(BATCH)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % log_every == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return model


class _Corpus:
    """Examples by chance.

    No calculation is from end to end that of a held-out problem. Within longer ones the steps of a third of them occur, as a
    base model has seen much of what it is asked; no question to them is there.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._asked = {name: _problems("train", name) for name in ASKED}
        self._words = [problem.demonstration.rpartition("\n")[0] for problem in _problems("train", "reverse")]
        self._held_out = {
            problem.messages[0].content for split in ("validation", "test") for problem in _problems(split, "subtract")
        }

    def draw(self) -> Example:
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "question":
            problem = self._random.choice(self._asked[self._random.choice(ASKED)])
            form = self._random.choices(FORMATS, SHARES)[0]
            steps = problem.demonstration.rpartition("\n")[0]
            return problem.messages[0].content, form.format(steps=steps, answer=problem.answer)
        if kind == "letters":
            return "Spell.", self._random.choice(self._words)
        return "Calculate.", self._calculation()

    def _calculation(self) -> str:
        """Subtractions of ones and tens, one after the other."""
        while True:
            left = start = self._random.randint(11, 99)
            lines = []
            for _ in range(self._random.randint(1, 3)):
                term = self._random.randint(1, 9) * self._random.choice((1, 10))
                if term <= left:
                    lines.append(f"{left}-{term}={left - term}")
                    left -= term
            if lines and f"What is {start} - {start - left}?" not in self._held_out:
                return "\n".join(lines)


def _problems(split: tasks.Split, family: str) -> list[Problem]:
    """All easy problems of a family."""
    families = (family,)
    return tasks.generate(split, tasks.available(split, families=families, max_level=1), families=families, max_level=1)


def _encode(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    question, response = example
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompt_ids, response_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, response))
    return prompt_ids, [*response_ids, tokenizer.eos_token_id]


def _loss(model: Qwen2ForCausalLM, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy over the response tokens of the batch."""
    length = max(len(prompt) + len(response) for prompt, response in batch)
    ids_BL = torch.full((len(batch), length), model.config.pad_token_id)
    learned_BL = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        ids_BL[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        learned_BL[row, len(prompt) : len(prompt) + len(response)] = True
    hidden_NK = model.model(ids_BL).last_hidden_state[:, :-1][learned_BL[:, 1:]]
    return F.cross_entropy(hidden_NK @ model.lm_head.weight.t(), ids_BL[:, 1:][learned_BL[:, 1:]])


def main(arguments: Sequence[str]) -> int:
    """Write the model and its tokenizer to a folder."""
    if len(arguments) != 1:
        print("usage: python -m mifo.train.mini FOLDER", file=sys.stderr)
        return 2
    set_up_cpu(1)
    model = pretrain()
    model.save_pretrained(arguments[0])
    char_tokenizer().save_pretrained(arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
