"""A text that ends responses, in a whole run: rollouts and evaluation stop at it, and it is what earns `reward.truncated`."""

import pytest
from conftest_e2e import SMALL, journal, run_small

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.load import load_config
from mifo.config.schema import Config
from mifo.errors import ConfigError

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 1}


def config_of(**rollout):
    plain = {
        **SMALL,
        "method": {"name": "grpo", "rl": RL},
        "rollout": {"max_response_tokens": 24, **rollout},
        "train": {"steps": 2, "threads": 1},
        "evaluation": {"temperature": 1.0},
        "run": {"checkpoint_steps": "none", "export": False, "samples_per_step": 16},
    }
    config = decode(Config, plain)
    check_config(config)
    return config


def test_responses_end_with_the_text(tmp_path):
    run_small(config_of(stop_texts=["1", "e"]), tmp_path / "run")
    samples = journal(tmp_path / "run", "samples")
    texts = [sample["response"] for sample in samples]
    by_text = [text for text in texts if text[-1:] in ("1", "e")]
    assert len(by_text) > len(texts) / 4
    assert all("1" not in text[:-1] and "e" not in text[:-1] for text in texts)
    [record, *_] = journal(tmp_path / "run", "metrics")
    run_small(config_of(), tmp_path / "longer")
    [longer, *_] = journal(tmp_path / "longer", "metrics")
    assert record["response_length"] < longer["response_length"]
    assert record["truncated"] < longer["truncated"]
    lengths = [
        next(e["response_length"] for e in journal(tmp_path / name, "events") if e["event"] == "evaluation")
        for name in ("run", "longer")
    ]
    assert lengths[0] < lengths[1]


def test_the_published_recipe_has_its_text_and_a_flag_gives_others():
    assert load_config("orz-qwen2.5-7b")[1].rollout.stop_texts == ("</answer>",)
    _, config = load_config("tiny", ["--rollout.stop-texts", "</answer>", "\n\n"])
    assert config.rollout.stop_texts == ("</answer>", "\n\n")
    for none in (["none"], ["none", "--train.steps", "3"]):
        assert load_config("orz-qwen2.5-7b", ["--rollout.stop-texts", *none])[1].rollout.stop_texts == ()
    assert load_config("orz-qwen2.5-7b", ["--rollout.stop-texts=none"])[1].rollout.stop_texts == ()


@pytest.mark.parametrize("text", ["", "x" * 65])
def test_texts_that_cannot_be(text):
    with pytest.raises(ConfigError, match=r"rollout\.stop_texts holds"):
        config_of(stop_texts=[text])
