"""The critic: a language model's body with a scalar head, as a function from micro-batches to values.

V_t is read from the hidden state that predicts token t, so it knows the prompt and the tokens before t, and the same packed
micro-batches, reducer, clip and guard serve it as serve the policy. The head starts at zero: the first values are 0, and the
first advantages those of no critic at all.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mifo.data.pack import MicroBatch
from mifo.errors import ModelError
from mifo.train.policy import Policy


class Critic(Policy):
    """A `Policy` whose head gives one number a token: `token_stats` are the values, and zeros in place of entropies."""

    quantity = "value"

    def token_stats(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(value_T, zeros) of the response tokens, differentiable; the head computes in the type of its weights."""
        rows = self._predictors(batch.to(self.device))
        with torch.autocast(self.device.type, enabled=False):
            value_T = F.linear(rows.hidden_TD.to(rows.weight_VD.dtype), rows.weight_VD, rows.bias_V)[:, 0]
        return value_T, torch.zeros_like(value_T)


def critic_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a language model with a scalar head, zero at first, in place of its output layer.

    Raises:
        ModelError: its output layer cannot be replaced.
    """
    copied = copy.deepcopy(model)
    old = copied.get_output_embeddings()
    assert isinstance(old, nn.Linear)  # the policy was made of the same model
    head = nn.Linear(old.in_features, 1).to(old.weight)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    copied.set_output_embeddings(head)
    if copied.get_output_embeddings() is not head:
        raise ModelError(
            f"{type(model).__name__} does not let its output layer be replaced, so it cannot be a critic. Use another "
            "architecture (Llama, Mistral, Qwen), or a method without one, such as 'grpo'."
        )
    return copied
