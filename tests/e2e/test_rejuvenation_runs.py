"""Rejuvenation in the middle of runs: it is what `mifo rejuvenate` does, counts what it costs, and resumes in the same bits."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest_e2e import cut_back, journal, replaced, run_small
from safetensors.torch import load_file
from test_phase_runs import LORA, MIFO, RL, SFT, Places
from test_resume import Calls, assert_same

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.config.stages import with_stages
from mifo.data.chartok import char_tokenizer
from mifo.errors import DataError, ModelError
from mifo.lab.overlap import overlap
from mifo.lab.rejuvenate import RejuvenationSettings, rejuvenate
from mifo.lab.samples import PairSettings
from mifo.train.build import make_grader, prepare
from mifo.train.calibration import demonstrated_pairs, reset_masks, token_entropies
from mifo.train.checkpoint import load_checkpoint, read_json
from mifo.train.estimate import estimate
from mifo.train.kept_phases import kept_phases
from mifo.train.model import load_model, tiny_model
from mifo.train.policy import Policy
from mifo.train.summary import export_model, summarise

SWITCHES = {"alpha": 0.25, "rho": 0.05, "targets": 3, "samples": 6}
GRPO = {"method": {"name": "grpo", "rl": RL | {"kl_coefficient": 0.5}}, "steps": 2}
STAGES = [{"method": SFT, "steps": 2}, {"rejuvenate": SWITCHES}, GRPO]
MULTI = {"name": "multi_stage", "rl": RL | {"kl_coefficient": 0.1}, "sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4}
RUNS = {
    "stages": {"stages": STAGES},
    "first": {"stages": [{"rejuvenate": SWITCHES | {"base": "{other}"}}, GRPO]},
    "between": {"method": MIFO, "rejuvenation": SWITCHES | {"every_intervals": 1}},
    "between_lora": {
        "method": {**MIFO, "sft": LORA},
        "rejuvenation": SWITCHES | {"every_intervals": 2, "signed": True},
    },
    "between_stages": {"method": MULTI, "rejuvenation": SWITCHES | {"every_intervals": 2}, "train": {"steps": 6}},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the random model: as trained, and of another seed."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("start", 0), ("other", 5)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        char_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Demonstrated problems, one of which has none."""
    rows = [
        {
            "id": f"p{i}",
            "problem": f"copy {i % 9}{i % 7}",
            "answer": f"{i % 9}{i % 7}",
            "demonstration": f"{i % 9}{i % 7}",
        }
        for i in range(30)
    ]
    del rows[1]["demonstration"]
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    others = [{"problem": f"copy {i}", "answer": f"{i}"} for i in range(3)]
    (path.parent / "held_out.jsonl").write_text("\n".join(map(json.dumps, others)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config_of(models, data):
    def config(name, changes=None):
        text = json.dumps(RUNS[name]).replace("{other}", str(models / "other"))
        tables = {
            "model": {"path": str(models / "start"), "compute": "float32"},
            "data": {
                "train": str(data),
                "evaluation": str(data.parent / "held_out.jsonl"),
                "evaluation_problems": 3,
                "verify_demonstrations": False,
            },
            "rollout": {"max_response_tokens": 8},
            "rl_optimizer": {"learning_rate": 1e-3},
            "sft_optimizer": {"learning_rate": 3e-3},
            "train": {"steps": 4},
            "run": {"checkpoint_steps": 1, "keep_checkpoints": 100, "export": False},
            **json.loads(text),
            **(changes or {}),
        }
        tables["data"] |= {"evaluation": "none"} if name == "between_stages" else {}
        tables["train"] = {"threads": 1, "micro_batch_tokens": 64, **tables["train"]}
        made = decode(Config, with_stages(tables))
        check_config(made)
        return made

    return config


@pytest.fixture(scope="module")
def runs(config_of, tmp_path_factory):
    """name -> (folder, finished run, places where it could have been stopped), each made once."""
    made = {}

    def run(name):
        if name not in made:
            folder, places = tmp_path_factory.mktemp(name) / "run", Places()
            made[name] = folder, run_small(config_of(name), folder, before=places), places.places
        return made[name]

    return run


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.learner.policy.model.named_parameters()}


def events(folder, name):
    return [event for event in journal(folder, "events") if event["event"] == name]


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switches",
    [
        SWITCHES,
        SWITCHES | {"signed": True, "alpha": 0.6},
        SWITCHES | {"per_module_quota": True, "rho": 0.02},
        {"rho": 0.0},
    ],
)
def test_a_stage_is_the_command_on_the_export(config_of, models, data, tmp_path, switches):
    """Same settings, same pairs: bit for bit what `mifo rejuvenate` writes, and the same figures beside it."""
    plain = config_of("stages")
    sft = dataclasses.replace(plain, stages=plain.stages[:1], run=dataclasses.replace(plain.run, export=True))
    run = run_small(sft, tmp_path / "sft")
    export_model(run)
    settings = RejuvenationSettings(
        **{name: value for name, value in switches.items() if name != "samples"},
        pairs=PairSettings(data=str(data), count=switches.get("samples", 64)),
    )
    done = rejuvenate(str(models / "start"), str(tmp_path / "sft"), str(tmp_path / "out"), settings)
    seen = {}

    def watch(run):
        enter = run.enter

        def first(phase):
            if run.stage == 1 and not seen:
                seen.update(weights_of(run))
            enter(phase)

        run.enter = first

    stages = [STAGES[0], {"rejuvenate": switches}, GRPO]
    run_small(config_of("stages", {"stages": stages}), tmp_path / "run", before=watch)
    for name, made in load_model(decode(Config, {"model": {"path": str(tmp_path / "out")}}).model).named_parameters():
        assert torch.equal(made, seen[name]), name
    [event] = events(tmp_path / "run", "rejuvenation")
    assert (event["reset_neurons"], event["targets"]) == (done.reset_neurons, done.selection.targets)
    assert (event["neuron_share"], event["element_share"]) == (done.neuron_share, done.element_share)
    assert event["entropies"] == json.loads(json.dumps([dataclasses.asdict(e) for e in done.entropies]))
    by_kind = {kind: [] for kind in event["shares"]}
    for row in done.rows():
        by_kind[row["module"]].append(row["share"])
    assert event["shares"] == by_kind
    assert bool(by_kind) == (switches["rho"] > 0)


def test_a_raised_rope_base_holds_for_the_base_too(config_of, models, data, tmp_path):
    """In the stage and in the command, which may be given the folder that training began with, or the kept start of the run."""
    plain = config_of("stages")
    stretched = dataclasses.replace(plain, model=dataclasses.replace(plain.model, rope_theta=40.0))
    kept = dataclasses.replace(plain.run, export=True, keep_phases=True)
    sft = dataclasses.replace(stretched, stages=plain.stages[:1], run=kept)
    export_model(run_small(sft, tmp_path / "sft"))
    [event] = events_of_stage(stretched, tmp_path / "run")
    settings = RejuvenationSettings(
        **{name: value for name, value in SWITCHES.items() if name != "samples"},
        pairs=PairSettings(data=str(data), count=SWITCHES["samples"]),
    )
    for number, base in enumerate((models / "start", tmp_path / "sft" / "phases" / "step-000000")):
        done = rejuvenate(str(base), str(tmp_path / "sft"), str(tmp_path / f"out{number}"), settings)
        assert event["entropies"] == json.loads(json.dumps([dataclasses.asdict(e) for e in done.entropies]))
        assert event["reset_neurons"] == done.reset_neurons
    assert (
        "rope_parameters"
        in rejuvenate(str(models / "start"), str(tmp_path / "sft"), str(tmp_path / "again"), settings).note
    )


def test_a_named_base_is_measured_under_the_configuration_of_what_is_trained(config_of, models, tmp_path):
    """An over-trained folder whose config.json has a raised RoPE base, and the original as base: as if both had it."""
    found = {}
    for name, raised in (("over", ("start",)), ("both", ("start", "other"))):
        for model in ("start", "other"):
            folder = Path(shutil.copytree(models / model, tmp_path / name / model))
            config = json.loads((folder / "config.json").read_text())
            if model in raised:
                config["rope_parameters"]["rope_theta"] = 40.0
            (folder / "config.json").write_text(json.dumps(config))
        stages = [{"rejuvenate": SWITCHES | {"base": str(tmp_path / name / "other")}}, GRPO]
        own = {"path": str(tmp_path / name / "start"), "compute": "float32"}
        [found[name]] = events_of_stage(config_of("first", {"stages": stages, "model": own}), tmp_path / name / "run")
    [plain] = events_of_stage(config_of("first"), tmp_path / "plain")
    assert found["over"]["entropies"] == found["both"]["entropies"] != plain["entropies"]
    assert found["over"]["shares"] == found["both"]["shares"]


def test_kept_phases_tell_a_rejuvenation_from_the_sft_before_it(config_of, models, data, tmp_path):
    plain = config_of("stages")
    run_small(replaced(plain, "run", keep_phases=True), tmp_path / "run")
    kept = kept_phases(tmp_path / "run")
    phases = [read_json(path / "state.json")["phase"] for path in kept]
    assert phases == ["start", "sft", "rejuvenation", "rl"]
    settings = RejuvenationSettings(
        **{name: value for name, value in SWITCHES.items() if name != "samples"},
        pairs=PairSettings(data=str(data), count=SWITCHES["samples"]),
    )
    sft = dataclasses.replace(plain, stages=plain.stages[:1], run=dataclasses.replace(plain.run, export=True))
    export_model(run_small(sft, tmp_path / "sft"))
    rejuvenate(str(models / "start"), str(tmp_path / "sft"), str(tmp_path / "out"), settings)
    for path, folder in ((kept[1], tmp_path / "sft" / "export"), (kept[2], tmp_path / "out")):
        own, theirs = load_file(path / "model.safetensors"), load_file(folder / "model.safetensors")
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
    changes = overlap([str(tmp_path / "run")]).phases
    assert [phase.name for phase in changes] == ["sft 1", "rejuvenation 1", "rl 1"]


@pytest.mark.parametrize("name", ["first", "between"])
def test_kept_phases_around_rejuvenations_are_made_once(config_of, tmp_path, name):
    config = replaced(config_of(name), "run", keep_phases=True)
    run_small(config, tmp_path / "whole")
    kept = kept_phases(tmp_path / "whole")
    phases = [read_json(path / "state.json")["phase"] for path in kept]
    assert "rejuvenation" in phases[1:]
    for before, after in itertools.pairwise(kept):
        pair = [load_file(path / "model.safetensors") for path in (before, after)]
        assert any(not torch.equal(pair[0][tensor], pair[1][tensor]) for tensor in pair[0]), after.name
    cut_back(tmp_path / "whole", tmp_path / "cut", 1)
    for path in kept[:-1]:
        shutil.copytree(path, tmp_path / "cut" / "phases" / path.name)
    run_small(config, tmp_path / "cut", resume=True)
    again = kept_phases(tmp_path / "cut")
    assert [path.name for path in again] == [path.name for path in kept]
    for mine, theirs in zip(again, kept, strict=True):
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def events_of_stage(config, folder):
    run_small(config, folder)
    return events(folder, "rejuvenation")


def test_reset_elements_are_the_bases_and_the_rest_is_the_fusion(config_of, tmp_path):
    seen = {}

    def watch(run):
        from mifo.train import rejuvenate as module

        take = module._take

        def taken(run, base, alpha, modules):
            before = weights_of(run)
            masks = take(run, base, alpha, modules)
            seen.update(before=before, base=dict(base.named_parameters()), after=weights_of(run), modules=modules)
            module._take = take
            return masks

        module._take = taken

    run_small(config_of("stages"), tmp_path / "run", before=watch)
    masks = reset_masks(seen["modules"], seen["after"])
    assert masks
    for name, after in seen["after"].items():
        base, before = seen["base"][name], seen["before"][name]
        reset = torch.zeros(after.shape, dtype=torch.bool)
        if name in masks:
            reset.index_fill_(masks[name][1], masks[name][0].nonzero()[:, 0], True)
        assert torch.equal(after[reset], base[reset]), name
        fusion = (0.25 * before.double() + 0.75 * base.double()).float()
        assert torch.allclose(after[~reset], fusion[~reset], rtol=0, atol=1e-7), name


def test_alpha_one_resets_and_keeps_every_other_bit(config_of, tmp_path):
    """The limit that is allowed: α = 1 with ρ > 0; and the refused one leaves every bit, in the code that a run calls."""
    from mifo.core.surgery import rejuvenated

    run = run_small(config_of("stages"), tmp_path / "run")
    for parameter in weights_of(run).values():
        same = rejuvenated(parameter, torch.randn_like(parameter), 1.0)
        assert same.numpy().tobytes() == parameter.numpy().tobytes()


def test_what_follows_sees_the_new_weights(runs):
    """The sampler's and the trainer's log-probs agree, KL starts from the rejuvenated model, moments and schedule begin anew."""
    folder, run, _ = runs("stages")
    records = [r for r in journal(folder, "metrics") if r["method"] == "grpo"]
    assert [r["stage"] for r in records] == [3, 3]
    gaps = [u["sampler_gap"] for r in records for u in r["updates"]]
    assert max(gaps) < 1e-5
    assert records[0]["updates"][0]["losses"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert records[-1]["updates"][-1]["losses"]["kl"] > 0
    assert run.parts.optimizers["rl"].state_tensors()["0.step"].item() == 4
    assert run.parts.optimizers["sft"].state_tensors() == {}
    assert not [e for e in journal(folder, "events") if e["event"] == "alarm"]


def test_it_is_told_apart_measured_and_paid_for(runs):
    folder, run, _ = runs("stages")
    summary = summarise(run)
    assert summary["method"] == "sft → rejuvenate → grpo"
    [done] = summary["rejuvenations"]
    assert (done["stage"], done["step"]) == (2, 2)
    assert set(done["entropy"]) == {"base", "over", "rejuvenated"}
    assert [(s["stage"], s["method"], s["steps"]) for s in summary["stages"]] == [
        (1, "sft", 2),
        (2, "rejuvenate", 0),
        (3, "grpo", 2),
    ]
    assert all(s["accuracy_after"] is not None for s in summary["stages"])
    labels = [e["label"] for e in events(folder, "evaluation")]
    assert labels == ["before", "after stage 1", "after stage 2", "after"]
    [event] = events(folder, "rejuvenation")
    assert event["pairs"] == 6
    assert 0 < event["neuron_share"] < 1
    assert {len(shares) for shares in event["shares"].values()} == {2}
    # Three passes for entropies, one forward and one backward a target for scores; 2ND each.
    pairs = demonstrated_pairs(run.parts.corpus)[:6]
    whole = sum(len(p.prompt_ids) + len(p.response_ids) for p in pairs)
    assert 3 * whole < event["fed_tokens"] <= (3 + 1 + 3) * whole
    ledger = run.ledger
    assert ledger.calibration_fed_tokens == event["fed_tokens"]
    assert ledger.calibration_flops == 2 * ledger.parameters * event["fed_tokens"]
    own = 6 * ledger.parameters * (ledger.rl_fed_tokens + ledger.sft_fed_tokens)
    assert ledger.training_flops == own + ledger.calibration_flops


def test_entropies_are_those_of_plain_passes(runs, config_of, models):
    folder, run, _ = runs("first")
    pairs = demonstrated_pairs(run.parts.corpus)[:6]
    [event] = events(folder, "rejuvenation")
    by_model = {entry["model"]: entry["tokens"]["mean"] for entry in event["entropies"]}
    for name, folder_name in (("base", "other"), ("over", "start")):
        model = load_model(decode(Config, {"model": {"path": str(models / folder_name)}}).model)
        expected = torch.cat(token_entropies(Policy(model), pairs)).double().mean().item()
        assert by_model[name] == pytest.approx(expected, rel=1e-6)


def test_pairs_are_the_first_demonstrations(runs):
    _, run, _ = runs("stages")
    assert [p.problem_id for p in demonstrated_pairs(run.parts.corpus)][:3] == ["p0", "p2", "p3"]


def test_activations_that_are_made_again_in_training_are_kept_in_calibration(runs, config_of, tmp_path):
    folder, _, _ = runs("stages")
    run_small(replaced(config_of("stages"), "model", activation_checkpointing=True), tmp_path / "run")
    [ours], [theirs] = events(tmp_path / "run", "rejuvenation"), events(folder, "rejuvenation")
    assert ours["reset_neurons"] == pytest.approx(theirs["reset_neurons"], abs=2)
    assert ours["reset_neurons"] > 0
    assert ours["reconstruction_error"]["max"] < 1e-4


# --- between intervals -----------------------------------------------------------------------------------------------


def test_it_comes_after_every_so_many_sft_phases_and_before_rl(runs):
    for name, every in (("between", 1), ("between_stages", 2)):
        folder, run, _ = runs(name)
        kinds = [e for e in journal(folder, "events") if e["event"] in ("phase", "rejuvenation")]
        order = " ".join(e.get("phase", "rejuvenated") for e in kinds)
        assert order.count("rejuvenated") == len(run.rejuvenations) >= 1
        assert [done["sft_phase"] for done in run.rejuvenations] == [
            every * (i + 1) for i in range(len(run.rejuvenations))
        ]
        if every == 1:
            assert order.count("sft rl") == 0  # RL never goes on without it
            assert order.count("sft rejuvenated rl") == len(run.rejuvenations)
        else:
            assert order == "sft rl sft rejuvenated rl sft rl"


def test_momentum_of_reset_neurons_is_gone_and_the_rest_stays(config_of, tmp_path):
    seen = []

    def watch(run):
        from mifo.train import rejuvenate as module

        take = module._take

        def moments():
            return {
                (name, part): {n: o.optimizer.state[p][part].clone() for n, p in named if p in o.optimizer.state}
                for name, o in run.parts.optimizers.items()
                for part in ("exp_avg", "exp_avg_sq")
            }

        named = list(run.learner.policy.model.named_parameters())

        def taken(*arguments):
            before = moments()
            masks = take(*arguments)
            seen.append((before, moments(), masks))
            module._take = take
            return masks

        module._take = taken

    run_small(config_of("between"), tmp_path / "run", before=watch)
    [(before, after, masks)] = seen
    assert masks
    for (optimizer, part), tensors in before.items():
        assert tensors, optimizer
        for name, old in tensors.items():
            new = after[optimizer, part][name]
            kept = torch.ones(old.shape, dtype=torch.bool)
            if name in masks and part == "exp_avg":
                kept.index_fill_(masks[name][1], masks[name][0].nonzero()[:, 0], False)
            assert torch.equal(new[kept], old[kept]), (optimizer, part, name)
            assert not new[~kept].any()
    assert any(before["rl", "exp_avg"][name].any() for name in masks)


def test_the_snapshot_is_taken_again_and_the_map_stays(config_of, tmp_path):
    seen = []

    def watch(run):
        enter = run.enter

        def watched(phase):
            began = len(run.rejuvenations)
            history = [c.clone() for c in run.importance.importance]
            enter(phase)
            if len(run.rejuvenations) > began:
                starts = zip(run.importance.start, run.importance.parameters, strict=True)
                assert all(torch.equal(start, parameter) for start, parameter in starts)
                assert all(torch.equal(a, b) for a, b in zip(history, run.importance.importance, strict=True))
                assert run.phase == "rl"
                seen.append(run.steps)

        run.enter = watched

    run = run_small(config_of("between"), tmp_path / "run", before=watch)
    assert len(seen) == len(run.rejuvenations) >= 1
    assert any(meter["frozen_fraction"] > 0 for meter in run.meters)


def test_the_meter_measures_sft_and_not_the_rejuvenation(config_of, runs, tmp_path):
    """The accuracy after the first SFT phase is that of a run without rejuvenation; the steps after it are not."""
    folder, run, _ = runs("between")
    plain = run_small(config_of("between", {"rejuvenation": {}}), tmp_path / "plain")
    assert run.meters[0] == plain.meters[0]
    first = run.rejuvenations[0]["step"]
    ours, theirs = (
        {r["iteration"]: r["updates"] for r in journal(f, "metrics") if r["step"] <= first}
        for f in (folder, tmp_path / "plain")
    )
    assert ours == theirs
    assert journal(folder, "metrics")[-1]["updates"] != journal(tmp_path / "plain", "metrics")[-1]["updates"]


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_killed_between_turns_and_resumed(runs, config_of, tmp_path, name):
    folder, run, _ = runs(name)
    every = range(1, run.iterations + 1)
    for iteration in every if name == "stages" else sorted({every[len(every) * share // 10] for share in (2, 7)}):
        target = tmp_path / f"cut-{iteration}"
        cut_back(folder, target, iteration)
        resumed = run_small(config_of(name), target, resume=True)
        assert_same(run, resumed)
        assert journal(target, "metrics") == journal(folder, "metrics")
        assert events(target, "rejuvenation") == events(folder, "rejuvenation")


class InCalibration:
    """Asks a run to stop at the n-th entropy or score of its calibrations."""

    def __init__(self, at, monkeypatch):
        self.at, self.seen, self.monkeypatch = at, 0, monkeypatch

    def __call__(self, run):
        from mifo.train import calibration, rejuvenate

        for module, name in (
            (rejuvenate, "token_entropies"),
            (calibration, "token_entropies"),
            (calibration, "top_neurons"),
        ):
            self.monkeypatch.setattr(module, name, self.watched(run, getattr(module, name)))

    def watched(self, run, inner):
        def call(*arguments, **keywords):
            self.seen += 1
            if self.seen == self.at:
                run.stop.request()
            return inner(*arguments, **keywords)

        return call


@pytest.mark.parametrize("name", ["stages", "between"])
@pytest.mark.parametrize("at", [1, 5, "last"])
def test_stopped_inside_a_rejuvenation(runs, config_of, tmp_path, name, at, monkeypatch):
    """While the base is read by, while neurons are scored, and while the made weights are measured, which is finished first."""
    folder, run, _ = runs(name)
    config = replaced(config_of(name), "run", checkpoint_steps=None)
    if at == "last":
        [one, *_] = [e["targets"] for e in events(folder, "rejuvenation")]
        at = 2 + one + 1  # entropies of base and model, a score a target, and the entropies of what was made
    with monkeypatch.context() as patch:
        stopped = run_small(config, tmp_path / "run", before=InCalibration(at, patch))
    assert stopped.stopped
    resumed = run_small(config, tmp_path / "run", resume=True)
    assert_same(run, resumed)
    assert journal(tmp_path / "run", "metrics") == journal(folder, "metrics")
    assert events(tmp_path / "run", "rejuvenation") == events(folder, "rejuvenation")


def test_stopped_while_accuracy_is_measured_around_it(runs, config_of, tmp_path):
    _, run, places = runs("stages")
    config = replaced(config_of("stages"), "run", checkpoint_steps=None)
    wanted = {p: at for at, p in enumerate(places, start=1) if p[1] is None and p[0] != "grade"}
    assert {stage for *_, stage in wanted} >= {0, 1}
    for at in wanted.values():
        target = tmp_path / str(at)
        assert run_small(config, target, before=Calls(at)).stopped
        assert_same(run, run_small(config, target, resume=True))


def test_a_forgotten_rejuvenation_would_be_noticed(runs, config_of, tmp_path):
    """The comparison can fail: a run that takes it for done ends in other bits."""
    folder, run, _ = runs("stages")
    cut_back(folder, tmp_path / "cut", 2)

    def forget(run):
        run.rejuvenations.append({"stage": 2})

    resumed = run_small(config_of("stages"), tmp_path / "cut", resume=True, before=forget)
    with pytest.raises(AssertionError):
        assert_same(run, resumed)


def test_a_checkpoint_knows_what_was_done(runs):
    folder, run, _ = runs("between")
    states = [load_checkpoint(p).state for p in sorted((folder / "checkpoints").glob("step-*"))]
    counts = [len(state["rejuvenations"]) for state in states]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == len(run.rejuvenations)


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def test_a_base_that_changed_meanwhile_is_refused(config_of, models, tmp_path):
    config = config_of("stages")
    moved = tmp_path / "model"
    tiny_model(seed=0).save_pretrained(moved)
    char_tokenizer().save_pretrained(moved)
    config = replaced(config, "model", path=str(moved))

    def swap(run):
        other = models / "other" / "model.safetensors"
        evaluate = run.evaluate

        def swapped(label, *rest):
            if label == "after stage 1":
                (moved / "model.safetensors").write_bytes(other.read_bytes())
            return evaluate(label, *rest)

        run.evaluate = swapped

    with pytest.raises(ModelError, match=r"holds other weights than when .* was started, and rejuvenation goes back"):
        run_small(config, tmp_path / "run", before=swap)


def test_a_base_with_weights_that_are_not_finite_is_named(config_of, tmp_path):
    broken, model = tmp_path / "broken", tiny_model(seed=0)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    char_tokenizer().save_pretrained(broken)
    stages = [STAGES[0], {"rejuvenate": SWITCHES | {"base": str(broken)}}, GRPO]
    with pytest.raises(
        ModelError, match=r"base of the rejuvenation, '.*broken', .*gate_proj.*what was trained is sound"
    ):
        run_small(config_of("stages", {"stages": stages}), tmp_path / "run")


def test_another_architecture_is_refused_before_training(config_of, tmp_path):
    wide = tmp_path / "wide"
    tiny_model(seed=0, hidden=96).save_pretrained(wide)
    char_tokenizer().save_pretrained(wide)
    stages = [STAGES[0], {"rejuvenate": SWITCHES | {"base": str(wide)}}, GRPO]
    with pytest.raises(
        ModelError, match=r"is another architecture than model\.path: model\.embed_tokens\.weight has shape"
    ):
        run_small(config_of("stages", {"stages": stages}), tmp_path / "run")
    stages[1]["rejuvenate"]["base"] = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        run_small(config_of("stages", {"stages": stages}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_data_without_demonstrations_short_enough(config_of):
    stages = [STAGES[0], {"rejuvenate": SWITCHES | {"max_tokens": 4}}, GRPO]
    config = config_of("stages", {"stages": stages})
    with make_grader(config) as grader, pytest.raises(DataError, match="at most max_tokens = 4 tokens"):
        prepare(config, grader)


def test_a_dry_run_counts_the_base(config_of):
    for name, rejuvenation in (("stages", None), ("between", {})):
        config = config_of(name)
        plain = config_of(name, {"stages": [STAGES[0], GRPO]} if rejuvenation is None else {"rejuvenation": {}})
        with make_grader(config) as grader:
            found, without = (estimate(c, (p := prepare(c, grader)).methods, p.corpus) for c in (config, plain))
        row = "base of a rejuvenation, while it lasts"
        assert (found.memory[row], without.memory[row]) == (4 * found.parameters, 0)
