"""Each mixed and sequential method on the random model: it trains what it says, and resumes in the same bits at three points."""

import json
from dataclasses import replace

import pytest
import torch
from conftest_e2e import cut_back, journal, replaced, run_small
from test_resume import Calls, assert_same

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import DataError
from mifo.train.build import make_grader, prepare
from mifo.train.checkpoint import load_checkpoint
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import Sequence

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01}
OWN = {"prompts_per_step": 4, "rollouts_per_prompt": 3, "updates_per_step": 2}
STEPS = 4
METHODS = {
    "relift": {"rl": RL, "buffer_size": 3},  # a step fails four questions: SFT is due often, and some always wait
    "luffy": {"rl": RL},
    "rl_with_sft": {"rl": RL, "sft": {"entropy_coefficient": 0.01, "loss": "gem", "token_fraction": 0.5}},
    "sft_rl": {"rl": RL | {"kl_coefficient": 0.1}, "sft_steps": 2, "sft_batch_size": 4},
    "rl_sft": {"rl": RL, "rl_steps": 2, "sft_batch_size": 4},
    "multi_stage": {"rl": RL | {"kl_coefficient": 0.1}, "sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4},
    "srft": OWN | {"sft": {"loss": "psft", "token_fraction": 0.5}},
    "hpt": {"rl": RL, "sft": {"loss": "psft"}},
    "superrl": {"rl": RL, "gate": "advantage", "sft": {"loss": "asft"}},
    "superrl log_sigma": {"rl": RL, "gate": "log_sigma", "sigma_rate": 0.1},
    "chord": {"rl": RL, "demonstrations_per_step": 2, "mu_warmup_steps": 1, "mu_decay_steps": 4},
    "uft": {"rl": RL, "hint_coefficient": 1.0, "hint_steps": 3},  # the last step has no hints
    "prefix_rft": {"rl": RL, "prefix_decay_steps": 4},
    "bread": {"rl": RL, "success_high": 1.0},  # a random model's groups are all right or all wrong
    "sasr": {"rl": RL | {"kl_coefficient": 0.1}, "warmup_steps": 1, "sft_batch_size": 4},
}


def config_of(name, **changes):
    config = decode(
        Config,
        {
            "model": {"path": "tiny", "compute": "float32"},
            "data": {"families": ["tiny"], "train_problems": 30, "evaluation": "none"},
            "rollout": {"max_response_tokens": 12},
            "method": {"name": name.split()[0], **METHODS[name]},
            "rl_optimizer": {"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "cosine", "decay_updates": 12},
            "sft_optimizer": {"learning_rate": 3e-3, "warmup_updates": 2},
            "train": {"steps": STEPS, "threads": 1, "micro_batch_tokens": 64, **changes},
            "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False, "samples_per_step": 16},
        },
    )
    check_config(config)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (folder, finished run), each made once."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            made[name] = folder, run_small(config_of(name), folder)
        return made[name]

    return run


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_resumed_in_the_same_bits(runs, tmp_path, name, share):
    folder, run = runs(name)
    cut_back(folder, tmp_path / "cut", max(1, round(share * run.iterations)))
    resumed = run_small(config_of(name), tmp_path / "cut", resume=True)
    assert_same(run, resumed)
    assert journal(tmp_path / "cut", "metrics") == journal(folder, "metrics")


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_from_what_it_collects(runs, name):
    """Both kinds of data are counted, and every loss of every update is there and finite."""
    folder, run = runs(name)
    records = journal(folder, "metrics")
    phases = [record["phase"] for record in records]
    expected = {
        "sft_rl": ["sft", "sft", "rl", "rl"],
        "rl_sft": ["rl", "rl", "sft", "sft"],
        "multi_stage": ["sft", "rl", "sft", "rl"],
    }.get(name)
    if name in ("relift", "sasr"):
        assert {"rl", "sft"} == set(phases)
        assert name == "sasr" or any(record["buffer"] > 0 for record in records)
    else:
        assert phases == (expected or ["mixed"] * STEPS)
    assert run.steps == STEPS
    ledger = run.ledger
    assert ledger.generated_tokens > 0
    assert ledger.demonstrations_used >= ledger.unique_demonstrations > 0
    updates = [update for record in records for update in record["updates"]]
    assert all(update["taken"] for update in updates)
    names = {term for update in updates for term in update["losses"]}
    assert names == {
        "relift": {"pg", "ent", "ce"},
        "luffy": {"pg", "ent", "off"},
        "rl_with_sft": {"pg", "ent", "ce", "sft_ent"},
        "srft": {"sft", "off", "pos", "neg"},
        "prefix_rft": {"pg", "ent"},
        "bread": {"pg", "ent"},
        **{key: {"pg", "ent", "kl", "ce"} for key in ("sasr", "sft_rl", "multi_stage")},
    }.get(name, {"pg", "ent", "ce"})


def test_a_stage_starts_with_a_fresh_optimizer(runs):
    """Two RL steps of one stage count on; in stages of one step each the warm-up starts again."""
    two = [
        u["learning_rate"] for r in journal(runs("sft_rl")[0], "metrics") if r["phase"] == "rl" for u in r["updates"]
    ]
    one = [
        u["learning_rate"]
        for r in journal(runs("multi_stage")[0], "metrics")
        if r["phase"] == "rl"
        for u in r["updates"]
    ]
    assert two[:2] == one[:2] == one[2:] == pytest.approx([5e-4, 1e-3])
    assert two[2:] != one[2:]
    moments = runs("multi_stage")[1].parts.optimizers["rl"].state_tensors()
    assert moments["0.step"].item() == 2


def test_chord_shows_other_questions_than_it_samples(runs):
    folder, run = runs("chord")
    assert run.stream.position == STEPS * (4 + 2)
    assert run.ledger.demonstrations_used == STEPS * 2
    assert next(record["mu"] for record in journal(folder, "metrics")) == pytest.approx(0.5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "bread"])
def test_demonstrations_become_likelier(runs, name):
    """What all of these have in common; a random model's rollouts are all wrong, so only demonstrations can do it.

    BREAD imitates nothing.
    """
    _, run = runs(name)
    sequences = [
        Sequence(problem_id=p, prompt_ids=e.prompt_ids, response_ids=e.demonstration_ids, weights={})
        for p, e in run.parts.corpus.encoded.items()
    ]
    before = run.learner.logprobs(sequences, Policy(tiny_model(seed=0)))
    after = run.learner.logprobs(sequences)
    assert sum(map(sum, after)) > sum(map(sum, before)) + 0.1 * len(sequences)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """name -> how many calls of the engine, the grader and the gradient a run makes."""
    made = {}

    def count(name):
        if name not in made:
            counting = Calls()
            config = replaced(config_of(name), "run", checkpoint_steps=None)
            run_small(config, tmp_path_factory.mktemp("calls") / "run", before=counting)
            made[name] = len(counting.seen)
        return made[name]

    return count


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_inside_a_turn(runs, calls, tmp_path, name, part):
    """Groups without rollouts, prefixes, buffers and demonstrations' old log-probs survive a stop between two updates."""
    config = replaced(config_of(name), "run", checkpoint_steps=None)
    stopped = run_small(config, tmp_path / "run", before=Calls(max(1, round(part * calls(name)))))
    assert stopped.stopped
    assert_same(runs(name)[1], run_small(config, tmp_path / "run", resume=True))


def test_prefixes_are_recorded_and_graded_with_their_continuations(runs):
    """Prefix-RFT starts with nearly whole demonstrations, so its hybrids are right from the first step on."""
    folder, _ = runs("prefix_rft")
    records = journal(folder, "metrics")
    assert all(record["begun"] == 0.25 for record in records)  # one of four
    assert records[0]["prefix_length"] > records[-1]["prefix_length"] > 0
    assert records[0]["accuracy"] == 0.25
    hybrids = [s for s in journal(folder, "samples") if s["prefix_tokens"]]
    assert hybrids
    assert all(s["tokens"] <= 12 for s in hybrids)


def test_bread_samples_again_what_fails_and_learns_from_what_it_finds(runs):
    folder, run = runs("bread")
    records = journal(folder, "metrics")
    assert all(record["prompts"] > 4 for record in records)  # the search took more groups
    assert all(update["sequences"] == 8 for record in records for update in record["updates"])  # and each replaced one
    assert run.ledger.problems_sampled == 4 * STEPS


def test_sasr_compares_with_the_end_of_its_warm_up(runs, tmp_path):
    """The reference is the model after the first step, in checkpoints from then on and after a resume."""
    folder, run = runs("sasr")
    after = load_checkpoint(folder / "checkpoints" / "step-000001").tensors
    assert "reference" not in after
    for name, kept in run.learner.reference.model.named_parameters():
        assert torch.equal(kept, after["model"][name]), name
        assert torch.equal(kept, load_checkpoint(folder / "checkpoints" / "step-000004").tensors["reference"][name])
    kl = [u["losses"]["kl"] for r in journal(folder, "metrics") if r["phase"] == "rl" for u in r["updates"]]
    assert max(kl) > 1e-6
    assert run.meters == []  # and nothing is measured around its single SFT steps


@pytest.mark.parametrize(("name", "begins"), [("sft_rl", {3: 2, 4: 2}), ("multi_stage", {2: 1, 3: 2, 4: 3})])
def test_a_later_stage_compares_with_its_own_beginning(runs, name, begins):
    """The reference after step s is the model as it was after step begins[s]; before that, the model as it was loaded."""
    folder, _ = runs(name)
    held = [load_checkpoint(folder / "checkpoints" / f"step-{step:06d}").tensors for step in range(1, STEPS + 1)]
    for step, tensors in enumerate(held, 1):
        assert ("reference" in tensors) == (step in begins)
        if step in begins:
            for weight, kept in tensors["reference"].items():
                assert torch.equal(kept, held[begins[step] - 1]["model"][weight]), (step, weight)
    records = [record for record in journal(folder, "metrics") if record["phase"] == "rl"]
    first = [record["updates"][0]["losses"]["kl"] for record in records if record["step"] - 1 in begins.values()]
    assert first == pytest.approx([0.0] * len(first), abs=1e-6)  # nothing has moved since
    assert max(record["updates"][-1]["losses"]["kl"] for record in records) > 1e-6


def test_sasr_s_next_step_follows_the_norm_that_was_measured(runs):
    folder, _ = runs("sasr")
    records = journal(folder, "metrics")
    norms = [r["updates"][-1]["grad_norm"] for r in records if r["phase"] == "sft"]
    assert records[-1]["warm_norm"] == records[0]["updates"][-1]["grad_norm"] == norms[0]
    assert records[-1]["last_norm"] == norms[-1]
    assert records[-1]["sft_probability"] == norms[-1] / (norms[-1] + norms[0])


def test_forgotten_prefixes_would_be_noticed(runs, tmp_path):
    """The comparison can fail: a resumed turn whose hybrids count as plain rollouts ends in other bits."""
    config = replaced(config_of("prefix_rft"), "run", checkpoint_steps=None)
    run_small(config, tmp_path / "run", before=Calls(5))

    def plain(rollout):
        return replace(rollout, prefix_tokens=0, logprobs=(-1.0,) * len(rollout.token_ids))

    def forget(run):
        groups = run.turn.groups
        run.turn.groups = tuple(replace(g, rollouts=tuple(map(plain, g.rollouts))) for g in groups)

    resumed = run_small(config, tmp_path / "run", resume=True, before=forget)
    with pytest.raises(AssertionError):
        assert_same(runs("prefix_rft")[1], resumed)


@pytest.mark.parametrize("name", ["uft", "prefix_rft", "bread"])
def test_sampler_and_trainer_agree_behind_a_prefix(runs, name):
    """The engine reads prompt and prefix as one prompt; the trainer feeds them as it likes."""
    folder, _ = runs(name)
    gaps = [u["sampler_gap"] for r in journal(folder, "metrics") for u in r["updates"]]
    assert max(gaps) < 1e-5
    assert not [e for e in journal(folder, "events") if e["event"] == "alarm"]


@pytest.mark.parametrize("name", ["uft", "prefix_rft", "bread", "sasr"])
def test_data_without_demonstrations_are_refused_before_a_model_is_loaded(tmp_path, name):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"problem": f"copy {i}", "answer": str(i)}) + "\n" for i in range(9)))
    config = replaced(config_of(name), "data", train=str(path), families=())
    with make_grader(config) as grader, pytest.raises(DataError, match="9 dropped without a demonstration"):
        prepare(config, grader)
