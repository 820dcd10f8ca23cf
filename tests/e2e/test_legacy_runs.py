"""Legacy settings in whole runs: said at the start, written into the summary, and each changes what it says."""

import json
import logging

import pytest
from conftest_e2e import cut_back, journal, run_small, small_config
from test_resume import assert_same

from mifo.config.check import check_config
from mifo.config.decode import decode, encode
from mifo.config.schema import Config
from mifo.data.chartok import char_tokenizer
from mifo.data.chat import Chat
from mifo.rewards import Grader
from mifo.train.build import make_chat
from mifo.train.guard import Guard
from mifo.train.summary import summarise
from mifo.types import Verdict

SUMS = {"reducer": "per_gpu", "gpus": 2, "micro_batch_tokens": 60}
RL = {
    "prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01, "normalizer": "constant",
}  # fmt: skip


def config_of(method, legacy):
    plain = encode(small_config(train={"steps": 2}))
    plain["method"] = method
    config = decode(Config, plain | {"legacy": legacy})
    check_config(config)
    return config


@pytest.mark.parametrize(
    ("method", "legacy"),
    [
        ({"name": "luffy", "rl": RL}, {"name": "luffy", **SUMS}),
        ({"name": "rl_with_sft", "rl": RL}, {"name": "rl_with_sft", **SUMS}),
        ({"name": "hpt", "rl": RL, "denominator": "stream"}, {"name": "hpt", **SUMS, "skip_above_norm": 80.0}),
        ({"name": "relift", "rl": RL, "buffer_size": 2}, {"name": "relift", **SUMS, "sft_over_gpus": True}),
        ({"name": "chord", "rl": RL, "demonstrations_per_step": 2}, {"name": "chord", **SUMS, "reducer": "by_sequences"}),
    ],
)  # fmt: skip
def test_a_run_says_that_it_is_legacy(method, legacy, tmp_path, caplog):
    config = config_of(method, legacy)
    with caplog.at_level(logging.WARNING):
        run = run_small(config, tmp_path / "run")
    [said] = [r.getMessage() for r in caplog.records if "legacy.name" in r.getMessage()]
    assert f"legacy.name = '{legacy['name']}': this run does on purpose" in said
    assert summarise(run)["legacy"] == legacy
    assert json.loads((tmp_path / "run" / "config.json").read_text())["legacy"]["name"] == legacy["name"]
    norms = [u["grad_norm"] for record in journal(tmp_path / "run", "metrics") for u in record["updates"]]
    fair = run_small(config_of(method, {}), tmp_path / "fair")
    assert summarise(fair)["legacy"] is None
    assert norms != [u["grad_norm"] for record in journal(tmp_path / "fair", "metrics") for u in record["updates"]]


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_a_legacy_run_resumes_in_the_same_bits(iteration, tmp_path):
    """ReLIFT's own state, its buffer, is in the checkpoint behind the published sums too."""
    method = {"name": "relift", "rl": RL, "buffer_size": 2}
    config = config_of(method, {"name": "relift", **SUMS, "sft_over_gpus": True})
    run = run_small(config, tmp_path / "run")
    assert run.iterations > 3
    cut_back(tmp_path / "run", tmp_path / "cut", iteration)
    assert_same(run, run_small(config, tmp_path / "cut", resume=True))


def test_a_norm_above_the_limit_is_skipped_whatever_is_usual():
    guard = Guard(small_config().guard, 80.0)
    guard.begin("mixed")
    assert guard.judge(1.0, 80.0) is None
    fault = guard.judge(1.0, 80.1)
    assert (fault.kind, fault.action) == ("norm", "skip")
    assert fault.reason == "gradient norm 80.1, above legacy.skip_above_norm = 80"
    plain = Guard(small_config().guard)
    plain.begin("mixed")
    assert plain.judge(1.0, 80.1) is None


def test_skipped_updates_leave_every_bit_and_are_events(tmp_path):
    """With a limit below every norm no update is taken, and the third in a row stops the run as others that were skipped do."""
    from mifo.errors import NumericsError

    method = {"name": "hpt", "rl": RL, "denominator": "stream"}
    seen = []

    def watch(run):
        start = [p.detach().clone() for p in run.learner.parameters]
        seen.append((run, start))

    config = config_of(method, {"name": "hpt", "skip_above_norm": 1e-9})
    with pytest.raises(NumericsError, match="in a row were skipped"):
        run_small(config, tmp_path / "run", before=watch)
    [(run, start)] = seen
    assert all(bool((a == b).all()) for a, b in zip(run.learner.parameters, start, strict=True))
    assert run.ledger.updates == 0
    faults = [e for e in journal(tmp_path / "run", "events") if e["event"] == "fault"]
    assert {e["fault"] for e in faults} == {"norm"}
    assert len(faults) == 3


def test_demonstrations_without_an_end():
    tokenizer = char_tokenizer()
    ended = Chat(tokenizer).demonstration_ids("copy")
    assert ended[-1] == tokenizer.eos_token_id
    open_ended = Chat(tokenizer, append_end=False)
    assert open_ended.demonstration_ids("copy") == ended[:-1]
    assert open_ended.stop_ids == Chat(tokenizer).stop_ids  # sampling stops as ever


def test_the_recipe_s_switch_reaches_the_chat():
    method = {"name": "sft", "sft": {"loss": "psft", "updates_per_batch": 2}, "batch_size": 4}
    config = config_of(method, {"name": "psft", "append_end": False})
    assert make_chat(config, char_tokenizer()).append_end is False
    assert make_chat(config_of(method, {}), char_tokenizer()).append_end is True


@pytest.mark.parametrize("required", [True, False])
def test_an_answer_without_the_end_of_thought_is_wrong_where_that_is_required(required, tmp_path, monkeypatch):
    monkeypatch.setattr(Grader, "grade", lambda self, items: [Verdict.CORRECT] * len(items))
    legacy = {"name": "luffy", "require_thought_end": True} if required else {}
    run_small(config_of({"name": "luffy", "rl": RL}, legacy), tmp_path / "run")
    verdicts = [record["verdicts"] for record in journal(tmp_path / "run", "metrics")]
    expected = (
        {"correct": 0, "wrong": 12, "error": 0, "timeout": 0}
        if required
        else {"correct": 12, "wrong": 0, "error": 0, "timeout": 0}
    )
    assert verdicts == [expected] * 2  # the tiny model never writes </think>
