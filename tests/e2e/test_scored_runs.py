"""PPO and PRIME on a small model that already solves some problems: both models learn, reward rises, and a run that is stopped
anywhere, also between the updates of its two models, ends in the same bits."""

from statistics import fmean

import pytest
import torch
from conftest_e2e import ABLE_DATA as DATA
from conftest_e2e import able_model, cut_back, journal, replaced, run_small
from test_resume import Calls, assert_same, digest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import NumericsError

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.0}
EVERY = {"least_accuracy": 0.0, "most_accuracy": 1.0}
METHODS = {
    "ppo": {"name": "ppo", "rl": RL, "gae_lambda": 0.95, "critic_updates_per_step": 3, "critic_warmup_steps": 1},
    "orz": {"name": "ppo", "rl": RL | {"updates_per_step": 1}, "critic_updates_per_step": 12, "value_clip": "none"},
    "prime": {"name": "prime", "rl": RL, "prm_updates_per_step": 2, "dense_baseline": "scaled", **EVERY},
    "prime before": {"name": "prime", "rl": RL, "prm_update": "before", **EVERY},
}
STEPS, LEARNING_STEPS = 3, 18


def config_of(model, method, *, steps=STEPS, **tables):
    plain = {
        "model": {"path": model, "compute": "float32"},
        "data": DATA,
        "rollout": {"max_response_tokens": 12},
        "reward": {"truncated": 0.0},
        "method": method,
        "rl_optimizer": {"learning_rate": 1e-3, "warmup_updates": 2},
        "train": {"steps": steps, "threads": 1, "micro_batch_tokens": 128},
        "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False},
    }
    own = "critic_optimizer" if method["name"] == "ppo" else "prm_optimizer"
    config = decode(Config, {**plain, own: {"learning_rate": 3e-3, "warmup_updates": 2}, **tables})
    check_config(config)
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return able_model(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """name -> (folder, finished run), each made once."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            made[name] = folder, run_small(config_of(start, METHODS[name]), folder)
        return made[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_both_models_learn_and_are_counted(runs, name):
    folder, run = runs(name)
    second, ledger = run.parts.scorer, run.ledger
    records = journal(folder, "metrics")
    lessons = [lesson for record in records for lesson in record[second.name]["updates"]]
    updates = [update for record in records for update in record["updates"]]
    assert all(lesson["taken"] for lesson in lessons)
    assert all(update["taken"] for update in updates)
    per_step = {"ppo": 3, "orz": 12, "prime": 2, "prime before": 1}[name]
    assert len(lessons) == ledger.scorer_updates == second.optimizer.updates == per_step * STEPS
    assert len(updates) == ledger.updates == {"ppo": 2 * (STEPS - 1), "orz": STEPS}.get(name, 2 * STEPS)
    assert sum(lesson["fed_tokens"] for lesson in lessons) == ledger.scorer_fed_tokens > 0
    assert ledger.scored_fed_tokens > 0
    own = 6 * ledger.parameters * ledger.rl_fed_tokens
    cost = ledger.scorer_parameters * (2 * ledger.scored_fed_tokens + 6 * ledger.scorer_fed_tokens)
    assert (ledger.training_flops, ledger.scorer_flops) == (own + cost, cost)
    assert run.ledger.summary()["scorer_flops"] == cost
    assert {second.name} <= set(run.ledger.seconds)


def test_scored_tokens_count_prompts_once_and_a_reward_model_s_reference(runs):
    _, ppo = runs("orz")
    _, prime = runs("prime")
    assert ppo.parts.scorer.passes * 2 == prime.parts.scorer.passes == 2
    generated, rollouts = ppo.ledger.generated_tokens, STEPS * 16
    assert ppo.ledger.scored_fed_tokens == generated - rollouts + ppo.ledger.prefilled_tokens
    fed = prime.ledger.generated_tokens - rollouts + prime.ledger.prefilled_tokens
    assert prime.ledger.scored_fed_tokens == 2 * fed


def test_a_checkpoint_holds_every_tensor_of_the_second_model(runs):
    for name, second in (("ppo", "critic"), ("prime", "prm")):
        tensors, state = digest(runs(name)[1])
        groups = {key.split("/")[0] for key in tensors}
        assert {second, f"{second}_optimizer", "model", "rl"} <= groups
        parameters = [key for key in tensors if key.startswith(f"{second}/")]
        moments = [key for key in tensors if key.startswith(f"{second}_optimizer/")]
        assert len(moments) == 3 * len(parameters)
        assert state["optimizers"][second]["updates"] > 0
    assert any("lm_head" in key for key in digest(runs("ppo")[1])[0] if key.startswith("critic/"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", [1, 2])
def test_resumed_in_the_same_bits(start, runs, tmp_path, name, place):
    folder, run = runs(name)
    cut_back(folder, tmp_path / "cut", place)
    resumed = run_small(config_of(start, METHODS[name]), tmp_path / "cut", resume=True)
    assert_same(run, resumed)
    assert journal(tmp_path / "cut", "metrics") == journal(folder, "metrics")


class Scored(Calls):
    """Also counts what the second model does; `apply` is heard when an update is whole."""

    def __call__(self, run):
        super().__call__(run)
        self.watch(run.parts.scorer, "scores")
        self.watch(run.parts.scorer.learner, "apply", "teach")
        self.watch(run.learner, "apply")

    def watch(self, owner, name, as_name=None):
        method = getattr(owner, name)

        def called(*arguments, **keywords):
            result = method(*arguments, **keywords)
            self.seen.append(as_name or name)
            if len(self.seen) == self.at:
                self.run.stop.request()
            return result

        setattr(owner, name, called)


@pytest.fixture(scope="module")
def places(start, tmp_path_factory):
    """name -> for the second turn, the numbers of calls at which it could be stopped, by what is called."""
    made = {}

    def find(name):
        if name not in made:
            calls = Scored()
            config = replaced(config_of(start, METHODS[name], steps=2), "run", checkpoint_steps=None)
            run_small(config, tmp_path_factory.mktemp("places") / "run", before=calls)
            second = len(calls.seen) - 1 - calls.seen[::-1].index("generate")
            made[name] = {}
            for number, call in enumerate(calls.seen[second:], start=second + 1):
                made[name].setdefault(call, []).append(number)
        return made[name]

    return find


STOPS = [(name, "teach last") for name in METHODS]
STOPS += [("ppo", "scores"), ("ppo", "teach first"), ("ppo", "apply first"), ("prime before", "scores")]


@pytest.mark.parametrize(("name", "call"), STOPS)
def test_stopped_inside_a_turn(start, runs, places, tmp_path, name, call):
    """While scoring, between two updates of the second model, between its last and the policy's first, after that one."""
    kind, _, which = call.partition(" ")
    at = places(name)[kind][-1 if which == "last" else 0]
    config = replaced(config_of(start, METHODS[name]), "run", checkpoint_steps=None)
    stopped = run_small(config, tmp_path / "run", before=Scored(at))
    assert stopped.stopped
    if call == "teach last":  # the second model is ahead of the policy, and the checkpoint says so
        assert len(stopped.turn.lessons) == {"ppo": 3, "orz": 12, "prime": 2, "prime before": 1}[name]
        assert stopped.turn.reports == []
    resumed = run_small(config, tmp_path / "run", resume=True)
    assert_same(runs(name)[1], resumed)
    assert journal(tmp_path / "run", "metrics") == journal(runs(name)[0], "metrics")


@pytest.mark.parametrize("forgotten", ["weights", "moments"])
def test_a_forgotten_second_model_would_be_noticed(start, runs, tmp_path, forgotten):
    folder, run = runs("ppo")

    def forget(run):
        second = run.parts.scorer
        if forgotten == "weights":
            torch.nn.init.zeros_(second.learner.policy.head.weight)
        else:
            second.optimizer.optimizer.state.clear()

    cut_back(folder, tmp_path / "cut", 1)
    resumed = run_small(config_of(start, METHODS["ppo"]), tmp_path / "cut", resume=True, before=forget)
    with pytest.raises(AssertionError):
        assert_same(run, resumed)


def test_the_policy_stands_still_while_the_critic_warms_up(start, tmp_path):
    method = METHODS["ppo"] | {"critic_warmup_steps": 2}
    config = replaced(config_of(start, method, steps=3), "run", checkpoint_steps=None)
    weights = []

    def watch(run):
        record = run.record

        def remember(*arguments):
            weights.append(torch.cat([p.detach().reshape(-1).clone() for p in run.learner.parameters]))
            return record(*arguments)

        run.record = remember

    run_small(config, tmp_path / "run", before=watch)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    records = journal(tmp_path / "run", "metrics")
    assert [len(record["updates"]) for record in records] == [0, 0, 2]
    assert records[0]["critic"]["score_right"] in (0.0, None)  # the head starts at zero
    assert records[1]["critic"]["score_wrong"] != 0.0


def test_weights_of_the_second_model_that_are_not_finite_are_never_saved(start, tmp_path):
    def spoil(run):
        record = run.record

        def ruin(*arguments):
            with torch.no_grad():
                next(iter(run.parts.scorer.learner.parameters))[0, 0] = float("nan")
            return record(*arguments)

        run.record = ruin

    config = replaced(config_of(start, METHODS["orz"], steps=1), "run", checkpoint_steps=None)
    with pytest.raises(NumericsError, match="a checkpoint would hold weights or moments that are NaN"):
        run_small(config, tmp_path / "run", before=spoil)


MANY = {"prompts_per_step": 16, "rollouts_per_prompt": 8, "updates_per_step": 2, "entropy_coefficient": 0.0}
LEARNING = {
    "ppo": ({"name": "ppo", "rl": MANY, "critic_updates_per_step": 4, "critic_warmup_steps": 1}, 1e-3),
    "prime": ({"name": "prime", "rl": MANY, "least_accuracy": 0.1, "most_accuracy": 0.9}, 3e-4),
}


@pytest.mark.parametrize("name", LEARNING)
def test_reward_rises(start, tmp_path, name):
    """Of 128 rollouts a step, some 13 % more are right in the last third of a run than in the first; here of two runs."""
    method, own_rate = LEARNING[name]
    own = "critic_optimizer" if name == "ppo" else "prm_optimizer"
    tables = {
        "rl_optimizer": {"learning_rate": 6e-4, "weight_decay": 0.0},
        own: {"learning_rate": own_rate, "weight_decay": 0.0},
    }
    first, last = [], []
    for seed in (0, 1):
        config = config_of(start, method, steps=LEARNING_STEPS, **tables)
        config = replaced(config, "train", micro_batch_tokens=8192, seed=seed)
        run_small(replaced(config, "run", checkpoint_steps=None), tmp_path / str(seed))
        rewards = [record["reward"] for record in journal(tmp_path / str(seed), "metrics")]
        first += rewards[: LEARNING_STEPS // 3]
        last += rewards[-(LEARNING_STEPS // 3) :]
    assert 0.2 < fmean(first) < 0.7
    assert fmean(last) > fmean(first) + 0.05, (first, last)  # 0.02: what chance alone does
