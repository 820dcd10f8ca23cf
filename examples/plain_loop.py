"""MIFO's parts in a plain PyTorch loop: RL moves a model, SFT then learns without touching what RL moved most.

Replace `reinforce` by your RL step and `solution` by your verified demonstrations; nothing here knows of a trainer.
"""

import torch
from torch import nn

from mifo import Demonstration, ElementFreeze, ImportanceMap, QuestionBuffer, top_entropy_weights

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
rl, sft = (torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01) for rate in (1e-3, 1e-2))
importance, buffer = ImportanceMap(model.parameters(), top=0.5, history=0.5), QuestionBuffer(capacity=8)


def reinforce(question: int) -> float:
    """Sample an answer, reward 31 − question, take one REINFORCE step; returns the reward."""
    policy = torch.distributions.Categorical(logits=model(torch.tensor(question)))
    answer = policy.sample((8,))
    rewards = (answer == 31 - question).float()
    (-(rewards - rewards.mean()) * policy.log_prob(answer)).mean().backward()
    rl.step(), rl.zero_grad()
    return float(rewards.mean())


for interval in range(6):
    importance.begin_interval()
    while not buffer.full:  # RL, until enough questions were failed
        question = int(torch.randint(32, ()))
        if reinforce(question) <= 1 / 8:
            buffer.add(Demonstration(problem_id=str(question), prompt_ids=(question,), response_ids=(31 - question,)))
    report = importance.end_interval()
    tokens = torch.tensor([d.prompt_ids + d.response_ids for d in buffer.take()])
    logits = model(tokens[:, :-1])  # SFT on the buffer, highest-entropy tokens only
    weights = top_entropy_weights(logits, torch.ones_like(tokens[:, 1:], dtype=torch.bool), fraction=0.2)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    (losses * weights.flatten()).sum().div(len(losses)).backward()
    with ElementFreeze(importance.masks()) as freeze:
        freeze.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        freeze.step(sft), sft.zero_grad()
    print(f"interval {interval}: {report.fraction:.0%} frozen, SFT loss {float(losses.detach().mean()):.2f}")
