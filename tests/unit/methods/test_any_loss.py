"""Any loss of imitation, on any share of tokens, in any method that imitates."""

import pytest
from test_methods import group
from test_mixed_methods import CHORD, RL
from test_prefix_methods import begun

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.imitation import AnchoredFineTuning, ChordPhi, DynamicFineTuning, EntropyAdaptive, GameEntropy
from mifo.core.losses import CrossEntropy, PolicyGradient
from mifo.methods import make_method
from mifo.types import TopEntropy

LOSSES = {
    "cross_entropy": CrossEntropy,
    "dft": DynamicFineTuning,
    "gem": GameEntropy,
    "psft": PolicyGradient,
    "asft": AnchoredFineTuning,
    "eaft": EntropyAdaptive,
    "chord_phi": ChordPhi,
}
IMITATING = {
    "sft": {},
    "mifo": {"buffer_size": 4, "freeze_top": 0.0},
    "relift": {"buffer_size": 4},
    "sft_rl": {"sft_steps": 1, "sft_batch_size": 4},
    "rl_sft": {"rl_steps": 1, "sft_batch_size": 4},
    "multi_stage": {"sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4},
    "sasr": {"warmup_steps": 1, "sft_batch_size": 4},
    "srft": {"prompts_per_step": 4, "updates_per_step": 2, "rollouts_per_prompt": 4},
    "rl_with_sft": {},
    "hpt": {},
    "superrl": {},
    "chord": CHORD | {"demonstrations_per_step": 4, "mu_warmup_steps": 0},
    "uft": {"hint_steps": 10},
}
PHASES = ("mifo", "relift", "sft_rl", "rl_sft", "multi_stage", "sasr", "sft")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", IMITATING)
def test_any_loss_on_selected_tokens_fits_any_method_that_imitates(name, loss):
    """The configuration is good, and what the engine is given is that loss, of the surest-not tokens, with what it looks at."""
    own = name in ("sft", "mifo")  # their fraction is a setting of the method
    sft = {"loss": loss} | ({} if own else {"token_fraction": 0.25})
    if loss == "psft" and name in PHASES:
        sft["updates_per_batch"] = 2
    table = {"name": name, **IMITATING[name], "sft": sft} | ({"token_fraction": 0.25} if own else {})
    if name not in ("sft", "srft"):
        table["rl"] = RL | {"prompts_per_step": 4, "updates_per_step": 2}
    config = decode(Config, {"method": table, "train": {"steps": 4}})
    check_config(config)
    one = make_method(config)
    [term] = {t for update in imitations(one, name) for t in update.terms if t.name in ("ce", "sft")}
    loss_of_term = term.loss.loss if name == "srft" else term.loss
    assert type(loss_of_term) is LOSSES[loss]
    assert term.select == TopEntropy(fraction=0.25)
    assert term.uses_old_policy == (loss == "psft")
    assert (term.vocabulary is not None) == (loss in ("gem", "asft", "eaft"))
    assert one.needs_reference == (loss == "asft")


def imitations(one, name):
    """The updates of the first step of a method that imitates."""
    for _ in range(4):
        phase = one.next_phase()
        groups = [group(n, 0, of=4) for n in "abcd"]
        if name == "uft":
            groups = [begun(g, *(2,) * 4) for g in groups]
        if name == "chord":
            groups += [group(n, 0, of=0) for n in "efgh"]
        updates = one.updates(phase, () if phase.prompts == 0 else groups)
        if phase.name != "rl":
            return updates
    raise AssertionError(name)
