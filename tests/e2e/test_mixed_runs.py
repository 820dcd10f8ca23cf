"""Each mixed and sequential method on the random model: it trains what it says, and resumes in the same bits at three points."""

import pytest
from conftest_e2e import cut_back, journal, replaced, run_small
from test_resume import Calls, assert_same

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import Sequence

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01}
OWN = {"prompts_per_step": 4, "rollouts_per_prompt": 3, "updates_per_step": 2}
STEPS = 4
METHODS = {
    "relift": {"rl": RL, "buffer_size": 3},  # a step fails four questions: SFT is due often, and some always wait
    "luffy": {"rl": RL},
    "rl_with_sft": {"rl": RL, "sft": {"entropy_coefficient": 0.01}},
    "sft_rl": {"rl": RL, "sft_steps": 2, "sft_batch_size": 4},
    "rl_sft": {"rl": RL, "rl_steps": 2, "sft_batch_size": 4},
    "multi_stage": {"rl": RL, "sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4},
    "srft": OWN,
    "hpt": {"rl": RL},
    "superrl": {"rl": RL, "gate": "advantage"},
    "chord": {"rl": RL, "demonstrations_per_step": 2, "mu_warmup_steps": 1, "mu_decay_steps": 4},
}


def config_of(name, **changes):
    config = decode(
        Config,
        {
            "model": {"path": "tiny", "compute": "float32"},
            "data": {"families": ["tiny"], "train_problems": 30, "evaluation": "none"},
            "rollout": {"max_response_tokens": 12},
            "method": {"name": name, **METHODS[name]},
            "rl_optimizer": {"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "cosine", "decay_updates": 12},
            "sft_optimizer": {"learning_rate": 3e-3, "warmup_updates": 2},
            "train": {"steps": STEPS, "threads": 1, "micro_batch_tokens": 64, **changes},
            "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False},
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
    if name == "relift":
        assert {"rl", "sft"} == set(phases)
        assert any(record["buffer"] > 0 for record in records)
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


@pytest.mark.parametrize("name", METHODS)
def test_demonstrations_become_likelier(runs, name):
    """What all of these have in common; a random model's rollouts are all wrong, so only demonstrations can do it."""
    _, run = runs(name)
    sequences = [
        Sequence(problem_id=p, prompt_ids=e.prompt_ids, response_ids=e.demonstration_ids, weights={})
        for p, e in run.parts.corpus.encoded.items()
    ]
    before = run.learner.logprobs(sequences, Policy(tiny_model(seed=0)))
    after = run.learner.logprobs(sequences)
    assert sum(map(sum, after)) > sum(map(sum, before)) + 0.1 * len(sequences)


@pytest.mark.parametrize("name", ["luffy", "chord"])
@pytest.mark.parametrize("place", [5, 9, 14])
def test_stopped_inside_a_turn(runs, tmp_path, name, place):
    """Groups without rollouts, and demonstrations' old log-probs, survive a stop between two updates."""
    config = replaced(config_of(name), "run", checkpoint_steps=None)
    stopped = run_small(config, tmp_path / "run", before=Calls(place))
    assert stopped.stopped
    assert_same(runs(name)[1], run_small(config, tmp_path / "run", resume=True))
