"""Adapters in SFT phases, a list of stages, control of freezing, and RL with a second model beside SFT phases, in whole runs;
each resumes in the same bits."""

import pytest
import torch
from conftest_e2e import cut_back, journal, replaced, run_small
from test_resume import Calls, assert_same

from mifo.config.check import check_config
from mifo.config.decode import decode, encode
from mifo.config.schema import Config
from mifo.config.stages import with_stages
from mifo.errors import CheckpointError
from mifo.train.adapters import _Adapted, adapted_layers
from mifo.train.checkpoint import list_checkpoints
from mifo.train.folder import check_folder
from mifo.train.model import tiny_model
from mifo.train.summary import summarise

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01}
LORA = {"lora_rank": 4, "lora_alpha": 16.0}
MIFO = {"name": "mifo", "rl": RL, "buffer_size": 6, "sft_batch_size": 4, "token_fraction": 0.5}
CONTROL = {"target_drop": 0.05, "gain": 0.3, "smoothing": 0.5, "token_gain": 0.2}
SFT = {"name": "sft", "batch_size": 4}
PPO = {"name": "ppo", "gae_lambda": 0.95, "critic_updates_per_step": 3, "critic_warmup_steps": 1}
PRIME = {"name": "prime", "prm_updates_per_step": 2, "least_accuracy": 0.0, "most_accuracy": 1.0}
SECOND = {
    "critic_optimizer": {"learning_rate": 3e-3},
    "reward": {"incorrect": -0.5},
}  # so that a critic has something to learn
RUNS = {
    "lora_mifo": {"method": {**MIFO, "sft": LORA}},
    "lora_relift": {"method": {"name": "relift", "rl": RL, "buffer_size": 3, "sft": LORA}},
    "lora_sft_rl": {"method": {"name": "sft_rl", "rl": RL, "sft_steps": 3, "sft_batch_size": 4, "sft": LORA}},
    "lora_psft": {"method": {**SFT, "sft": {**LORA, "loss": "psft", "updates_per_batch": 2}}},
    "controlled": {"method": {**MIFO, "control": CONTROL}},
    "stages": {
        "method": MIFO,
        "stages": [
            {"method": SFT, "steps": 2, "sft_optimizer": {"learning_rate": 1e-3}},
            {"steps": 3},
            {"method": {"name": "grpo", "rl": RL}, "steps": 1, "rl_optimizer": {"beta2": 0.9}},
        ],
    },
    "lora_stages": {
        "method": {**MIFO, "sft": {"lora_rank": 2}},
        "stages": [{"steps": 2}, {"method": {**SFT, "sft": LORA}, "steps": 2}],
    },
    "ppo_mifo": {"method": {**MIFO, "scorer": PPO}, **SECOND},
    "prime_mifo": {"method": {**MIFO, "scorer": PRIME}, "prm_optimizer": {"learning_rate": 3e-3}},
    "prime_relift": {
        "method": {"name": "relift", "rl": RL, "buffer_size": 3, "scorer": {**PRIME, "prm_update": "before"}}
    },
    "ppo_multi_stage": {
        "method": {"name": "multi_stage", "rl": RL, "sft_steps": 1, "rl_steps": 2, "sft_batch_size": 4, "scorer": PPO},
        "train": {"steps": 6, "threads": 1, "micro_batch_tokens": 64},
        **SECOND,
    },
    "ppo_stages": {
        "method": MIFO,
        "stages": [{"method": SFT, "steps": 2}, {"method": {**PPO, "rl": RL}, "steps": 2}, {"steps": 1}],
        **SECOND,
    },
}


def config_of(name, **changes):
    tables = with_stages(
        {
            "model": {"path": "tiny", "compute": "float32"},
            "data": {"families": ["tiny"], "train_problems": 30, "evaluation_problems": 3},
            "rollout": {"max_response_tokens": 12},
            "rl_optimizer": {"learning_rate": 1e-3, "warmup_updates": 2, "schedule": "cosine", "decay_updates": 12},
            "sft_optimizer": {"learning_rate": 3e-3, "warmup_updates": 2},
            "evaluation": {"every_steps": 2},
            "train": {"steps": 5, "threads": 1, "micro_batch_tokens": 64},
            "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False},
            **RUNS[name],
        }
    )
    for table, values in changes.items():
        tables[table] = {**tables[table], **values}
    config = decode(Config, tables)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> (folder, finished run), each made once."""
    made = {}

    def run(name, with_places=False):
        if name not in made:
            folder, places = tmp_path_factory.mktemp(name) / "run", Places()
            made[name] = folder, run_small(config_of(name), folder, before=places), places.places
            (folder / "samples.jsonl").touch()  # SFT alone samples nothing
        return made[name] if with_places else made[name][:2]

    return run


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_resumed_in_the_same_bits(runs, tmp_path, name, share):
    folder, run = runs(name)
    cut_back(folder, tmp_path / "cut", max(1, round(share * run.iterations)))
    resumed = run_small(config_of(name), tmp_path / "cut", resume=True)
    assert_same(run, resumed)
    for stream in ("metrics", "samples"):
        assert journal(tmp_path / "cut", stream) == journal(folder, stream)


class Places(Calls):
    """Also writes down where each call was: its name, the phase, whether there are adapters, the stage."""

    def __init__(self, at=None):
        super().__init__(at)
        self.places = []

    def watch(self, owner, name):
        method = getattr(owner, name)

        def placed(*arguments, **keywords):
            run = self.run
            self.places.append((name, run.phase, run.learner.adapters is not None, run.stage))
            return method(*arguments, **keywords)

        setattr(owner, name, placed)
        super().watch(owner, name)


@pytest.mark.parametrize("name", ["lora_mifo", "lora_stages", "stages", "ppo_stages"])
def test_stopped_inside_a_turn_of_adapters_and_between_stages(runs, tmp_path, name):
    """Between their updates, while accuracy is measured in their phase or after it, and in the evaluation between stages."""
    config = replaced(config_of(name), "run", checkpoint_steps=None)
    folder, run, places = runs(name, with_places=True)
    start = next(at for at, (_, phase, *_) in enumerate(places) if phase is not None)
    wanted = [(at, p) for at, p in enumerate(places, start=1) if at > start and (p[1] in ("sft", None))]
    chosen = {place: at for at, place in wanted if place[0] != "grade"}  # the last of each kind
    assert any(adapted for *_, adapted, _ in chosen) == name.startswith("lora")
    assert any(phase is None for _, phase, *_ in chosen) == name.endswith("stages")
    for at in chosen.values():
        target = tmp_path / str(at)
        assert run_small(config, target, before=Calls(at)).stopped, places[at - 1]
        resumed = run_small(config, target, resume=True)
        assert_same(run, resumed)
        assert journal(target, "metrics") == journal(folder, "metrics"), places[at - 1]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("lora")])
def test_checkpoints_are_made_inside_a_phase_of_adapters(runs, name):
    folder, run = runs(name)
    inside = [(p / "adapters.safetensors").is_file() for p in list_checkpoints(folder / "checkpoints")]
    assert any(inside)
    assert not inside[-1]
    assert run.learner.adapters is None
    assert all(p.requires_grad for p in run.learner.parameters)
    hooks = [hook for module in run.learner.policy.model.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, _Adapted) for hook in hooks)


@pytest.mark.parametrize("name", ["lora_sft_rl", "lora_psft"])
def test_sft_moves_the_linear_layers_alone(tmp_path, name):
    config = config_of(name)
    seen = []

    def watch(run):
        inner = run.enter

        def enter(phase):
            inner(phase)
            seen.append((phase.name, [p.detach().clone() for p in run.learner.parameters]))

        run.enter = enter

    run = run_small(config, tmp_path / "run", before=watch)
    start = list(tiny_model(seed=0).parameters())
    in_sft = [weights for phase, weights in seen if phase == "sft"]
    assert all(torch.equal(a, b) for weights in in_sft for a, b in zip(weights, start, strict=True))
    after = next((weights for phase, weights in seen if phase == "rl"), run.learner.parameters)
    layers = {id(layer.weight) for layer in adapted_layers(run.learner.policy.body).values()}
    for parameter, old, new in zip(run.learner.parameters, start, after, strict=True):
        assert torch.equal(old, new) == (id(parameter) not in layers)


def test_an_evaluation_inside_a_phase_measures_the_merged_model(tmp_path):
    """What the engine samples from at the third step is, in its bits, what the phase leaves behind after it."""
    seen = []

    def watch(run):
        sync = run.sync_engine

        def record():
            weights = [p.detach().clone() for p in run.learner.parameters]
            seen.append((run.steps, run.learner.adapters is not None, weights))

        run.sync_engine = lambda: (sync(), record())

    run_small(config_of("lora_sft_rl", evaluation={"every_steps": 1}), tmp_path / "run", before=watch)
    inside = {step: weights for step, adapted, weights in seen if adapted}
    assert list(inside) == [1, 2, 3]
    left = next(weights for step, adapted, weights in seen if step == 3 and not adapted)
    start = list(tiny_model(seed=0).parameters())
    for own, merged in zip(inside[3], left, strict=True):
        assert torch.equal(own, merged)
    assert any(not torch.equal(own, base) for own, base in zip(inside[1], start, strict=True))


def test_frozen_elements_keep_their_bits_where_adapters_are_merged(tmp_path):
    found = []

    def watch(run):
        inner = run.enter

        def enter(phase):
            if run.phase == "sft" and phase.name == "rl":
                masks = [run.importance.mask(i).clone() for i in range(len(run.importance.parameters))]
                start = [s.clone() for s in run.importance.start]
                inner(phase)
                found.append((masks, start, [p.detach().clone() for p in run.learner.parameters]))
            else:
                inner(phase)

        run.enter = enter

    run = run_small(config_of("lora_mifo"), tmp_path / "run", before=watch)
    assert len(found) >= 1
    assert any(meter["frozen_fraction"] > 0.1 for meter in run.meters)
    frozen_in_layers = 0
    layers = {id(layer.weight) for layer in adapted_layers(run.learner.policy.body).values()}
    for masks, start, after in found:
        for parameter, mask, old, new in zip(run.learner.parameters, masks, start, after, strict=True):
            assert old[mask].numpy().tobytes() == new[mask].numpy().tobytes()
            if id(parameter) in layers:
                frozen_in_layers += int(mask.sum())
                assert int((old != new)[~mask].sum()) > 0.9 * int((~mask).sum())
    assert frozen_in_layers > 0


def test_the_schedule_of_adapters_goes_on_and_their_flops_are_counted(runs):
    folder, run = runs("lora_mifo")
    rates = [u["learning_rate"] for r in journal(folder, "metrics") if r["phase"] == "sft" for u in r["updates"]]
    assert len(run.meters) >= 2
    assert rates == pytest.approx([1.5e-3] + [3e-3] * (len(rates) - 1))  # one warm-up in all
    ledger = run.ledger
    assert ledger.adapter_fed_tokens == ledger.sft_fed_tokens > 0
    full = 6 * ledger.parameters * (ledger.rl_fed_tokens + ledger.sft_fed_tokens)
    assert 6 * ledger.parameters * ledger.rl_fed_tokens < ledger.training_flops < full


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_a_stage_of_its_own_is_sft_then_rl(tmp_path, kl):
    """The oracle of stages: SFT and GRPO as a list are the method sft_rl, bit by bit, and so is what KL compares with."""
    tables = {"evaluation": {"every_steps": "none"}, "train": {"steps": 4}}
    plain = encode(config_of("lora_sft_rl", **tables))
    plain["method"] |= {"sft_steps": 2}
    plain["method"]["sft"] |= {"lora_rank": "none", "lora_alpha": 128.0}
    plain["method"]["rl"] |= {"kl_coefficient": kl}
    one = run_small(decode(Config, plain), tmp_path / "one")
    grpo = {"method": {"name": "grpo", "rl": RL | {"kl_coefficient": kl}}, "steps": 2}
    plain |= {"stages": [{"method": SFT, "steps": 2}, grpo]}
    two = run_small(decode(Config, with_stages(plain)), tmp_path / "two")
    assert ("reference" in one.snapshot().tensors) == (kl > 0)
    for name in ("model", "rl", *(["reference"] if kl else [])):
        mine, theirs = two.snapshot().tensors[name], one.snapshot().tensors[name]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert two.stream.position == one.stream.position


def test_stages_are_told_apart(runs):
    folder, run = runs("stages")
    records = journal(folder, "metrics")
    assert [(r["stage"], r["method"]) for r in records if r["step"] <= 2] == [(1, "sft")] * 2
    assert {r["method"] for r in records} == {"sft", "mifo", "grpo"}
    assert [r["stage"] for r in records] == sorted(r["stage"] for r in records)
    assert records[-1]["method"] == "grpo"
    assert any(r["stage"] == 2 and r["phase"] == "sft" for r in records)
    assert run.steps == 6
    summary = summarise(run)
    assert summary["method"] == "sft → mifo → grpo"
    assert [(s["stage"], s["method"], s["steps"]) for s in summary["stages"]] == [
        (1, "sft", 2),
        (2, "mifo", 3),
        (3, "grpo", 1),
    ]
    assert all(s["accuracy_after"] is not None for s in summary["stages"])
    assert all(meter["stage"] == 2 for meter in summary["sft_phases"])
    events = [e for e in journal(folder, "events") if e["event"] == "stage"]
    assert [(e["stage"], e["method"], e["step"]) for e in events] == [(2, "mifo", 2), (3, "grpo", 5)]


def test_every_stage_begins_with_fresh_optimizers_of_its_own_settings(runs):
    folder, run = runs("stages")
    records = journal(folder, "metrics")
    first = {n: next(r["updates"][0]["learning_rate"] for r in records if r["stage"] == n) for n in (1, 2, 3)}
    assert first == pytest.approx({1: 5e-4, 2: 5e-4, 3: 5e-4})  # half of the peak each: a warm-up of two
    taught = [r["updates"][0]["learning_rate"] for r in records if r["phase"] == "sft"]
    assert taught[:3] == pytest.approx([5e-4, 1e-3, 1.5e-3])  # the second stage has the run's own rate again
    rl = run.parts.optimizers["rl"]
    assert rl.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert rl.updates == rl.state_tensors()["0.step"].item() == 2
    assert run.parts.optimizers["sft"].state_tensors() == {}
    assert run.importance is None  # grpo freezes nothing


def test_control_is_in_metrics_meters_and_freezing(runs):
    folder, run = runs("controlled")
    assert len(run.meters) >= 2
    records = journal(folder, "metrics")
    assert records[0]["freeze_top"] == 0.5
    top, fraction, mean = 0.5, 0.5, None
    for meter in run.meters:
        assert meter["freeze_top"] == pytest.approx(top)
        drop = meter["before"] - meter["after"]
        mean = drop if mean is None else 0.5 * mean + 0.5 * drop
        top = min(max(top + 0.3 * (mean - 0.05), 0.0), 0.95)
        fraction = min(max(fraction - 0.2 * (mean - 0.05), 0.05), 1.0)
    assert run.method.control.freeze_top == pytest.approx(top) != 0.5
    assert run.method.control.token_fraction == pytest.approx(fraction)
    moved = [e["moved_fraction"] for e in journal(folder, "events") if e["event"] == "phase" and e["phase"] == "sft"]
    for meter, share in zip(run.meters, moved, strict=True):
        assert meter["frozen_fraction"] == pytest.approx(min(meter["freeze_top"], share), abs=1e-4)


def test_other_stages_are_refused_on_resume(runs, tmp_path):
    plain = encode(config_of("stages"))
    plain["stages"][2]["steps"] = 2
    with pytest.raises(CheckpointError, match=r"stages\[3\]\.steps = 1, not 2"):
        check_folder(runs("stages")[0], decode(Config, plain), resume=True)


@pytest.mark.parametrize(("scorer", "second"), [(PPO, "critic"), (PRIME, "prm")])
def test_mifo_before_its_first_sft_phase_is_its_rl_alone(tmp_path, scorer, second):
    """The oracle of a second model in MIFO: with a buffer that never fills, PPO or PRIME, bit by bit."""
    tables = {"evaluation": {"every_steps": "none"}, "train": {"steps": 3}}
    plain = encode(config_of("ppo_mifo", **tables))
    alone = run_small(decode(Config, {**plain, "method": {**scorer, "rl": RL}}), tmp_path / "alone")
    plain["method"] = {**MIFO, "buffer_size": 30, "sft_batch_size": 30, "freeze_top": 0.0, "scorer": scorer}
    inside = run_small(decode(Config, plain), tmp_path / "inside")
    assert inside.sft_phases == 0
    for name in ("model", "rl", second, f"{second}_optimizer"):
        mine, theirs = inside.snapshot().tensors[name], alone.snapshot().tensors[name]
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert inside.ledger.flops == alone.ledger.flops


@pytest.mark.parametrize(("scorer", "second"), [(PPO, "critic"), (PRIME, "prm")])
def test_a_second_model_is_made_from_the_policy_that_its_rl_begins_with(tmp_path, scorer, second):
    """SFT and PPO (PRIME) as a list are sft_rl with that RL, bit by bit; and what is scored first knows what SFT has taught."""
    tables = {"evaluation": {"every_steps": "none"}, "train": {"steps": 4}}
    plain = encode(config_of("ppo_mifo", **tables))
    one = {"name": "sft_rl", "rl": RL, "sft_steps": 2, "sft_batch_size": 4, "scorer": scorer}
    first = run_small(decode(Config, {**plain, "method": one}), tmp_path / "one")
    stages = [{"method": SFT, "steps": 2}, {"method": {**scorer, "rl": RL}, "steps": 2}]
    made = []

    def watch(run):
        restart = run.parts.scorer.restart

        def remember(policy):
            restart(policy)
            own = dict(run.parts.scorer.learner.policy.model.named_parameters())
            body = {n: p for n, p in policy.model.named_parameters() if own[n].shape == p.shape}
            made.append((run.steps, all(torch.equal(own[n], p) for n, p in body.items()), len(own) - len(body)))

        run.parts.scorer.restart = remember

    second_run = run_small(decode(Config, with_stages({**plain, "stages": stages})), tmp_path / "two", before=watch)
    assert made == [(2, True, 2 if second == "critic" else 0)]  # but for the critic's head
    for name in ("model", "rl", second, f"{second}_optimizer"):
        mine, theirs = second_run.snapshot().tensors[name], first.snapshot().tensors[name]
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    records = journal(tmp_path / "two", "metrics")
    assert [second in record for record in records] == [False, False, True, True]
    assert ("reference" in second_run.snapshot().tensors) == (second == "prm")  # the policy that RL began with


def test_a_second_model_stands_still_in_sft_phases_and_goes_on_after_them(runs):
    folder, run = runs("ppo_mifo")
    records = journal(folder, "metrics")
    phases = [record["phase"] for record in records]
    assert phases.index("sft") < len(phases) - 1 - phases[::-1].index("rl")  # RL after SFT
    assert all(("critic" in record) == (record["phase"] == "rl") for record in records)
    lessons = [lesson for record in records if "critic" in record for lesson in record["critic"]["updates"]]
    assert len(lessons) == 3 * phases.count("rl") == run.parts.scorer.optimizer.updates
    assert len(run.meters) >= 1
    assert run.meters[0]["frozen_fraction"] > 0.0


def test_each_rl_part_of_several_has_a_critic_and_a_warm_up_of_its_own(runs):
    folder, run = runs("ppo_multi_stage")
    records = [record for record in journal(folder, "metrics") if record["phase"] == "rl"]
    assert [len(record["updates"]) for record in records] == [0, 2, 0, 2]
    assert [record["critic"]["score_wrong"] == 0.0 for record in records] == [True, False, True, False]
    assert run.parts.scorer.optimizer.updates == 6
