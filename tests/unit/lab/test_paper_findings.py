"""Findings: the runs they ask for, and what they make of runs that were made up."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mifo.cli import main
from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import CheckpointError, ConfigError
from mifo.lab.paper import suite
from mifo.lab.paper.finding import Evidence
from mifo.lab.paper.measure import demonstrations, norms, pass_gaps
from mifo.lab.paper.plan import LATER_SEED, Plan
from mifo.lab.paper.s3_plasticity import _gradient_norm
from mifo.lab.paper.suite import FINDINGS, Options, beyond_defaults, chosen, recorded, run_suite
from mifo.lab.paper.tier import SMALL, SMOKE, TIERS
from mifo.lab.trial_results import Evaluation, TrialResult
from mifo.lab.trials import Trials
from mifo.report.paper_page import claims_csv, page
from mifo.report.paper_plot import draw_claims
from mifo.train.lock import FolderLock
from mifo.train.model import tiny_model
from mifo.train.stop import Stop

BY_NAME = {finding.name: finding for finding in FINDINGS}
PROBLEMS = [f"p{i}" for i in range(40)]


def solved(share):
    """Verdicts on the problems, the first `share` of them right."""
    return {problem: float(i < round(share * len(PROBLEMS))) for i, problem in enumerate(PROBLEMS)}


def result(plan, name, seed, after, before=0.2, *, length=20.0, gradient=1.0, loss=1.0, flops=None):
    """A finished run that nobody ran."""
    config = plan.made[f"{name}-seed{seed}"].config
    spent = flops if flops is not None else config.train.max_flops or 1.0
    return TrialResult(
        name=f"{name}-seed{seed}",
        folder=Path("nowhere") / f"{name}-seed{seed}",
        config=config,
        evaluations=tuple(
            Evaluation(label=label, step=0, flops=0.0, by_problem=solved(share))
            for label, share in (("before", before), ("after", after))
        ),
        summary={"flops": spent, "seconds": 1.0, "response_length_after": length},
        ledger={},
        metrics=({"accuracy": 0.5, "updates": [{"loss": loss, "grad_norm": gradient}]},),
    )


def evidence_of(name, shares, tmp_path, tier=SMALL, **figures):
    """Runs of a finding where each run ends with `shares[run]`, plus a little for each seed; no two runs spread alike."""
    plan = Plan(tier=tier, folder=Path("suite"))
    BY_NAME[name].trials(plan)
    results = {
        f"{run}-seed{seed}": result(
            plan,
            run,
            seed,
            share + 0.025 * seed + 0.025 * (place % 7) * (seed - 1),
            **{key: by_run[run] for key, by_run in figures.items() if run in by_run},
        )
        for place, (run, share) in enumerate(shares.items())
        for seed in plan.seeds
    }
    return Evidence(plan=plan, results=results, cache=tmp_path)


def judged(name, shares, tmp_path, tier=SMALL, **figures):
    """Claims of a finding from such runs."""
    return list(BY_NAME[name].judge(evidence_of(name, shares, tmp_path, tier, **figures)))


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_every_run_of_every_finding_is_a_configuration_that_holds(tier):
    plan = Plan(tier=replace(tier, seeds=min(2, tier.seeds) if tier is SMOKE else 1), folder=Path("suite"))
    for finding in FINDINGS:
        trials = finding.trials(plan)
        assert len({trial.name for trial in trials}) == len(trials) > 0
        for seed in plan.seeds:
            assert any(trial.name.endswith(f"-seed{seed}") for trial in trials), finding.name
    for trial in plan.made.values():
        check_config(trial.config)
        assert (trial.config.train.max_flops is None) == (trial.config.train.steps < 1_000_000)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda f: f.name)
def test_without_runs_nothing_can_be_told(finding, tmp_path):
    plan = Plan(tier=SMOKE, folder=Path("suite"))
    claims = list(finding.judge(Evidence(plan=plan, results={}, cache=tmp_path)))
    assert claims
    assert all(claim.measured is None and claim.verdict == "cannot be told" for claim in claims)
    assert list(tmp_path.iterdir()) == []


def test_later_runs_draw_other_data_and_begin_from_earlier_ones():
    plan = Plan(tier=SMOKE, folder=Path("suite"))
    later = plan.rl_phase(1)
    assert later.after is plan.start(1)
    assert (later.after.config.train.seed, later.config.train.seed) == (1, 1 + LATER_SEED)


def test_the_random_model_of_a_seed_is_there_to_be_compared_with(tmp_path):
    plan = Plan(tier=SMOKE, folder=tmp_path)
    plan.write_shipped(1)
    plan.write_shipped(1)
    written = load_file(tmp_path / "shipped" / "seed1" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], tiny_model(1).model.norm.weight)
    assert torch.equal(written["model.embed_tokens.weight"], tiny_model(1).model.embed_tokens.weight)
    assert Plan(tier=SMALL, folder=tmp_path).shipped(1) == "smollm2-135m-instruct"


def test_a_name_stands_for_one_run():
    plan = Plan(tier=SMOKE, folder=Path("suite"))
    plan.trial("mine", 0, plan.sft(), steps=2)
    assert plan.trial("mine", 0, plan.sft(), steps=2) is plan.made["mine-seed0"]
    with pytest.raises(ConfigError, match="'mine-seed0'"):
        plan.trial("mine", 0, plan.sft(), steps=3)


def test_equal_rate_updates_and_problems_of_rl_and_sft():
    plan = Plan(tier=SMALL, folder=Path("suite"))
    rl, sft = plan.rl_phase(0).config, plan.sft_like_rl(0).config
    assert rl.train.steps == sft.train.steps
    assert rl.rl_optimizer.learning_rate == sft.sft_optimizer.learning_rate
    assert rl.method.rl.prompts_per_step == sft.method.batch_size
    assert rl.method.rl.updates_per_step == 1


def test_forgetting_is_told_from_keeping(tmp_path):
    kept = {"rl": 0.6, "forget-rl": 0.7, "forget-mifo": 0.8}
    lost = {f"forget-{name}": 0.2 for name in ("rl_sft", "luffy", "srft", "relift")}
    claims = judged("forgetting", kept | lost, tmp_path)
    assert [claim.verdict for claim in claims] == ["reproduces"] * 7
    assert claims[1].measured.value == pytest.approx(-0.4)
    claims = judged("forgetting", dict.fromkeys(kept | lost, 0.1) | {"rl": 0.6}, tmp_path)
    assert {claim.verdict for claim in claims if "keeps" in claim.text} == {"does not"}
    assert {claim.verdict for claim in claims if "falls" in claim.text} == {"reproduces"}


def test_the_ablation_is_judged_by_its_order(tmp_path):
    paper = {"int": 0.1, "es": 0.35, "pf": 0.4, "mifo": 0.7}
    assert {claim.verdict for claim in judged("ablation", paper, tmp_path)} == {"reproduces"}
    reverse = {"int": 0.7, "es": 0.4, "pf": 0.35, "mifo": 0.1}
    assert {claim.verdict for claim in judged("ablation", reverse, tmp_path)} == {"does not"}
    assert {claim.verdict for claim in judged("ablation", dict.fromkeys(paper, 0.5), tmp_path)} == {"cannot be told"}


def test_a_difference_of_differences(tmp_path):
    shares = {"rl": 0.8, "rl-drop": 0.3, "sft": 0.6, "sft-drop": 0.5}  # RL loses 50 points, SFT 10
    alone, little, more = judged("online-sparsity", shares, tmp_path)
    assert (alone.measured.value, little.measured.value) == (pytest.approx(-0.5), pytest.approx(-0.1))
    assert more.measured.value == pytest.approx(0.4)
    swapped = {"sft": 0.8, "sft-drop": 0.3, "rl": 0.6, "rl-drop": 0.5}
    assert judged("online-sparsity", swapped, tmp_path)[2].measured.value == pytest.approx(-0.4)


def test_gradients_and_gains_of_over_trained_models(tmp_path, monkeypatch):
    moved = {"under-rl": 4.0, "mod-rl": 2.0, "over-rl": 1.0, "over": 10.0}
    monkeypatch.setattr(
        "mifo.lab.paper.s3_plasticity.total_norms",
        lambda evidence, before, after: {seed: moved[after] * (1 + 0.01 * seed) for seed in evidence.plan.seeds},
    )
    evidence = evidence_of(
        "plasticity",
        {"under-rl": 0.9, "mod-rl": 0.7, "over-rl": 0.3},
        tmp_path,
        before={"under-rl": 0.1, "mod-rl": 0.2, "over-rl": 0.2},
        gradient={"under-rl": 0.5, "mod-rl": 1.0, "over-rl": 3.0},
    )
    values = [claim.measured.value for claim in BY_NAME["plasticity"].judge(evidence)]
    assert values == pytest.approx([3.0, 0.5, 0.1, -0.4, -0.4])
    ahead, *beside = BY_NAME["plasticity"].remarks(evidence)
    assert ahead.startswith("before RL overSFT is ahead of modSFT by +0.0 points")
    # the paper has the under-trained model elsewhere
    assert [text.partition(": ")[2].split(" ")[0] for text in beside] == ["6", "0.25", "-70.0"]
    for name, shares in (("over-rl", (0.5, 0.7)), ("mod-rl", (0.9, 0.9))):
        for seed in evidence.plan.seeds:
            run = evidence.results[f"{name}-seed{seed}"]
            turns = tuple({"all_equal_groups": share, "updates": []} for share in shares)
            evidence.results[run.name] = replace(run, metrics=turns)
    assert "40 % from overSFT, 10 % from modSFT" in BY_NAME["plasticity"].remarks(evidence)[1]


def test_the_gap_of_pass_at_k_is_of_single_problems(tmp_path, monkeypatch):
    """One right of eight: the problem is solved once in eight, and its gap is 7/8; all or none right: 0."""
    plan = Plan(tier=SMOKE, folder=tmp_path)
    BY_NAME["saturation"].trials(plan)
    asked = []

    def sampled(config):
        asked.append((config.evaluation.samples, config.evaluation.temperature, config.data.evaluation))
        return {"a": 1 / 8, "b": 1.0, "c": 0.0}

    monkeypatch.setattr("mifo.lab.paper.measure.verdicts", sampled)
    monkeypatch.setattr(Evidence, "export", lambda self, name, seed: str(tmp_path))
    results = {f"over-seed{seed}": result(plan, "over", seed, 0.5) for seed in plan.seeds}
    evidence = Evidence(plan=plan, results=results, cache=tmp_path / "measures")
    assert pass_gaps(evidence, "over") == {seed: {"a": 7 / 8, "b": 0.0, "c": 0.0} for seed in plan.seeds}
    assert pass_gaps(evidence, "over")[0]["a"] == 7 / 8
    assert asked == [(8, 0.6, results["over-seed0"].config.data.evaluation)] * SMOKE.seeds


def test_a_measurement_is_made_once_for_the_runs_that_it_is_of(tmp_path, monkeypatch):
    evidence = evidence_of("magnitude", {"start": 0.3, "rl": 0.5}, tmp_path / "measures", SMOKE)
    asked = []

    def change(before, after, largest):
        asked.append((before, after))
        group = type("G", (), {"norm": float(len(asked)), "layer": 0})
        return type("M", (), {"total": lambda self: group, "layers": lambda self: [group]})()

    monkeypatch.setattr("mifo.lab.paper.measure.magnitude", change)
    monkeypatch.setattr(Evidence, "export", lambda self, name, seed: f"{name}-{seed}")
    assert norms(evidence, 0, "start", "rl") == norms(evidence, 0, "start", "rl") == {"total": 1.0, "layer 0": 1.0}
    assert asked == [("start-0", "rl-0")]
    again = {
        **evidence.results,
        "rl-seed0": replace(evidence.results["rl-seed0"], summary={"flops": 1.0, "seconds": 2.0}),
    }
    later = replace(evidence, results=again)
    assert norms(later, 0, "start", "rl")["total"] == 2.0  # trained again, so measured again
    assert norms(later, 1, "start", "rl")["total"] == 3.0
    assert demonstrations(replace(evidence, results={}), "rl", "validation") == {"loss": {}, "entropy": {}}


# --- the suite ---------------------------------------------------------------------------------------------------------


class Runner:
    """Stands for `run_trials`: every run ends well, but those named in `failing`."""

    def __init__(self):
        self.calls, self.failing, self.stopped = [], (), False

    def __call__(self, trials, folder, **options):
        self.calls.append([trial.name for trial in trials])
        plan = Plan(tier=SMOKE, folder=Path("suite"))
        plan.made.update({trial.name: trial for trial in trials})
        results = {}
        for trial in trials:
            name, _, seed = trial.name.rpartition("-seed")
            if trial.name not in self.failing:
                results[trial.name] = result(plan, name, int(seed), 0.5)
        failures = tuple(
            suite_failure for suite_failure in (type("F", (), {"name": n, "reason": "broke"})() for n in self.failing)
        )
        return Trials(results=results, failures=failures, stopped=self.stopped)


@pytest.fixture
def runner(monkeypatch):
    fake = Runner()
    monkeypatch.setattr(suite, "run_trials", fake)
    return fake


def run(tmp_path, names, *, tier=SMOKE, arena=None):
    options = Options(folder=tmp_path, jobs=1, threads=1, arena=arena)
    return run_suite(tier, chosen(names), options, stop=Stop(), say=lambda line: None)


def test_what_was_judged_is_not_run_again_unless_its_runs_are_others(runner, tmp_path):
    first = run(tmp_path, ["ablation", "length"])
    assert len(runner.calls) == 2
    assert run(tmp_path, ["ablation", "length"]) == first
    assert len(runner.calls) == 2
    run(tmp_path, ["ablation"], tier=replace(SMOKE, description="the same in other words"))
    assert len(runner.calls) == 2
    run(tmp_path, ["ablation"], tier=replace(SMOKE, flops=2 * SMOKE.flops))
    assert len(runner.calls) == 3


def test_the_page_is_of_all_that_the_folder_holds(runner, tmp_path):
    """A single finding asked for later, or a stop, leaves the others on the page; records of other runs are not on it."""
    options = Options(folder=tmp_path, jobs=1, threads=1)
    assert recorded(SMOKE, options) == []
    first = run(tmp_path, ["length"])
    second = run(tmp_path, ["ablation"])
    assert recorded(SMOKE, options) == [*first, *second]  # in the order of the suite
    assert recorded(replace(SMOKE, flops=2 * SMOKE.flops), options) == []
    heard = []
    run_suite(
        SMOKE,
        chosen(["ablation", "length"]),
        options,
        stop=Stop(),
        say=lambda line: None,
        judged_one=lambda: heard.append(len(recorded(SMOKE, options))),
    )
    assert heard == [2, 2]


def test_a_second_suite_in_the_folder_is_refused(runner, tmp_path):
    with FolderLock(tmp_path / "findings"), pytest.raises(CheckpointError, match="--folder"):
        run(tmp_path, ["ablation"])


def test_an_arena_that_is_not_there_or_of_no_use_is_refused_before_anything_is_trained(capsys, tmp_path):
    def mistake(*flags):
        assert main(["paper", "--tier", "smoke", "--folder", str(tmp_path / "suite"), *map(str, flags)]) == 2
        assert not (tmp_path / "suite").exists()
        return capsys.readouterr().err

    assert "is no folder" in mistake("--arena", tmp_path / "nothing")
    assert "none of magnitude can be judged" in mistake("--only", "magnitude", "--arena", tmp_path)


def test_a_failed_run_is_told_and_tried_again(runner, tmp_path):
    runner.failing = ("mifo-seed0",)
    found = run(tmp_path, ["ablation"])[0]
    assert "mifo-seed0 failed: broke" in found.notes
    assert found.claims[2].measured.seeds == SMOKE.seeds - 1
    [shown] = recorded(SMOKE, Options(folder=tmp_path, jobs=1, threads=1))
    assert shown == found
    text = page(SMOKE, [shown])
    assert "(1 runs failed)" in text
    assert "- mifo-seed0 failed: broke" in text
    runner.failing = ()
    assert not run(tmp_path, ["ablation"])[0].notes
    assert len(runner.calls) == 2


def test_the_command_fails_where_runs_failed(runner, tmp_path, capsys):
    words = ["paper", "--tier", "smoke", "--only", "ablation", "--folder", str(tmp_path)]
    runner.failing = ("mifo-seed0",)
    assert main(words) == 2
    assert "ablation: 1 runs failed" in capsys.readouterr().out
    runner.failing = ()
    assert main(words) == 0


def test_a_record_of_other_runs_is_told_of(runner, tmp_path):
    run(tmp_path, ["ablation"])
    heard = []
    other = replace(SMOKE, flops=2 * SMOKE.flops)
    assert recorded(other, Options(folder=tmp_path, jobs=1, threads=1), say=heard.append) == []
    assert heard == ["ablation is left out of the page: its record is of other runs than it has now"]


def test_a_record_that_is_not_whole_is_refused_with_a_remedy(runner, tmp_path):
    run(tmp_path, ["ablation"])
    path = tmp_path / "findings" / "ablation.json"
    record = json.loads(path.read_text())
    del record["notes"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"ablation\.json is no whole record .*Remove it"):
        run(tmp_path, ["ablation"])


def test_rl_on_top_of_sft_is_what_is_claimed_and_the_equal_budget_is_a_remark(tmp_path):
    methods = {"sft": 0.6, "sft_rl": 0.5, "luffy": 0.3, "relift": 0.3, "srft": 0.3}
    shares = {f"shipped-{name}": share for name, share in methods.items()} | {"start": 0.3, "rl": 0.4, "rl-short": 0.5}
    evidence = evidence_of("corrected", shares, tmp_path, flops={"start": 1e12, "rl-short": 2e12})
    claims = {claim.text: claim for claim in BY_NAME["corrected"].judge(evidence)}
    assert claims["RL on top of SFT improves on it"].measured.value == pytest.approx(0.1)
    assert claims["a short RL phase on top of SFT is better than luffy"].measured.value == pytest.approx(0.2)
    assert claims["SFT→RL is better than hpt"].measured is None  # it has no runs here
    equal, spent = BY_NAME["corrected"].remarks(evidence)
    assert "SFT→RL less SFT alone: -10.0 points" in equal
    assert "spent 15 % of the budget of the others at most" in spent


def test_methods_beside_each_other(tmp_path):
    shares = {"mifo": 0.8, "sft-alone": 0.3, "rl-alone": 0.3, "sft_rl": 0.3, "relift": 0.3, "luffy": 0.3, "srft": 0.3}
    assert [claim.verdict for claim in judged("methods", shares, tmp_path)] == ["reproduces"] * 6
    plan = Plan(tier=SMALL, folder=Path("suite"))
    trials = {trial.name: trial for trial in BY_NAME["methods"].trials(plan)}
    assert {trial.config.train.max_flops for trial in trials.values()} == {SMALL.flops}
    assert {trial.after.name.partition("-")[0] for trial in trials.values()} == {"start"}


def test_what_pruning_loses_is_paired_by_problem(tmp_path, monkeypatch):
    """RL loses 20 points at the higher rate and SFT 5; nothing at the lower one."""
    shares = {"rl": {"0": 0.6, "0.5": 0.6, "0.9": 0.4}, "sft": {"0": 0.7, "0.5": 0.7, "0.9": 0.65}}

    def found(evidence, seed, before, after):
        return {rate: solved(share - 0.025 * seed * (rate == "0.9")) for rate, share in shares[after].items()}

    monkeypatch.setattr("mifo.lab.paper.s0_updates.solved_pruned", found)
    evidence = evidence_of("pruning", {"start": 0.3, "rl": 0.6, "sft": 0.7}, tmp_path)
    low, high = BY_NAME["pruning"].judge(evidence)
    assert (low.measured.value, high.measured.value) == (pytest.approx(0.0), pytest.approx(0.15))
    assert high.measured.problems == len(PROBLEMS)
    [gained] = BY_NAME["pruning"].remarks(evidence)
    assert gained.startswith("from the start RL had gained +")


def test_one_interval_says_nothing_of_history(tmp_path):
    evidence = evidence_of("sensitivity", {"mifo": 0.5, "mifo-alpha-0": 0.5}, tmp_path)
    for seed in evidence.plan.seeds:
        run = evidence.results[f"mifo-seed{seed}"]
        evidence.results[run.name] = replace(run, summary={**run.summary, "intervals": 2 - (seed > 0)})
    [remark] = BY_NAME["sensitivity"].remarks(evidence)
    assert remark.endswith("where α has no effect: seed 1, 2")


def test_shares_of_neurons_that_were_reset_are_on_the_page(tmp_path):
    evidence = evidence_of("rejuvenation-switches", {"rejuvenated-rl": 0.5, "rejuvenated-0.005-rl": 0.5}, tmp_path)
    for name, run in list(evidence.results.items()):
        share = 0.17 if "0.005" in name else 0.29
        evidence.results[name] = replace(run, summary={**run.summary, "rejuvenations": [{"neuron_share": share}]})
    [remark] = BY_NAME["rejuvenation-switches"].remarks(evidence)
    assert remark == "neurons reset, the union over 48 pairs: ρ = 1 %: 29 %, ρ = 0.5 %: 17 %; in the paper very few"


def test_what_rl_gains_after_rejuvenation(tmp_path):
    """From where the rejuvenated model stands to where it ends: 0.2 more than the over-trained model gains."""
    shares = {"rejuvenated-rl": 0.5, "over-rl": 0.6, "mod-rl": 0.6, "fused-rl": 0.5, "over-dft-rl": 0.5}
    evidence = evidence_of("rejuvenation", shares, tmp_path, before={"over-rl": 0.4, "rejuvenated-rl": 0.4})
    for seed in evidence.plan.seeds:
        stage = Evaluation(label="after stage 1", step=0, flops=0.0, by_problem=solved(0.1))
        own = evidence.results[f"rejuvenated-rl-seed{seed}"]
        evidence.results[own.name] = replace(own, evaluations=(*own.evaluations, stage))
    gain = BY_NAME["rejuvenation"].judge(evidence)[-1]
    assert gain.text == "RL gains more after rejuvenation than from overSFT"
    assert gain.measured.value == pytest.approx(0.2)


def test_a_stop_keeps_what_was_judged(runner, tmp_path):
    run(tmp_path, ["short-rl"])
    runner.stopped = True
    assert run(tmp_path, ["ablation", "short-rl"]) is None
    runner.stopped = False
    assert len(run(tmp_path, ["ablation", "short-rl"])) == 2
    assert len(runner.calls) == 3


def test_exports_go_when_no_later_finding_needs_them(runner, tmp_path):
    for name in ("start", "rl", "sft"):
        (tmp_path / "runs" / f"{name}-seed0" / "export").mkdir(parents=True)
    run(tmp_path, ["short-rl", "ablation"])  # both begin from the start; only the first needs rl's model
    left = {path.parent.name for path in tmp_path.glob("runs/*/export")}
    assert left == {"sft-seed0"}  # no finding of this call made it


def test_runs_of_an_arena_can_stand_for_those_of_a_finding(runner, tmp_path):
    arena = tmp_path / "arena"
    with pytest.raises(ConfigError, match="no finished run of int"):
        run(tmp_path, ["ablation"], arena=arena)
    plan = Plan(tier=SMOKE, folder=Path("suite"))
    BY_NAME["ablation"].trials(plan)
    for name, share in {"int": 0.2, "es": 0.4, "pf": 0.6, "mifo": 0.8}.items():
        for seed in plan.seeds:
            _write_run(arena / "runs" / f"{name}-seed{seed}", plan.made[f"{name}-seed{seed}"].config, share)
    found = run(tmp_path, ["ablation"], arena=arena)[0]
    assert runner.calls == []
    assert found.runs == 4 * SMOKE.seeds
    assert found.claims[0].measured.value == pytest.approx(0.2)
    assert found.setting.startswith(f"Runs of the arena {arena}, from tiny")
    shutil.rmtree(arena / "runs" / "es-seed0")
    shutil.rmtree(tmp_path / "findings")
    assert "es has no finished run of seed 0" in run(tmp_path, ["ablation"], arena=arena)[0].notes
    shutil.rmtree(tmp_path / "findings")
    shutil.rmtree(arena / "runs" / "pf-seed0")
    _write_run(arena / "runs" / "pf-seed0", plan.made["pf-seed0"].config, 0.6, parameters=7)
    with pytest.raises(ConfigError, match=r"pf-seed0 has 7 parameters, and the model of tier smoke has"):
        run(tmp_path, ["ablation"], arena=arena)


TINY_PARAMETERS = sum(parameter.numel() for parameter in tiny_model(0).parameters())


def _write_run(folder, config, share, parameters=TINY_PARAMETERS):
    from mifo.config.decode import encode

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(encode(config)))
    summary = {"flops": 1.0, "seconds": 1.0, "response_length_after": 9.0, "parameters": parameters}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "ledger.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    record = {"label": "after", "step": 1, "flops": 1.0, "problems": solved(share)}
    (folder / "evaluations.jsonl").write_text(json.dumps(record) + "\n")


def test_gradient_norms_are_means_over_all_updates_that_were_taken(tmp_path):
    """Figure 4 of S3 averages over training: updates without a signal count as 0; faulted ones were not taken."""
    over = evidence_of("plasticity", {"over-rl": 0.5}, tmp_path).runs("over-rl")[0]
    norms = [0.0] * 20 + [1.0] * 20 + [math.nan]
    assert _gradient_norm(replace(over, metrics=tuple({"updates": [{"grad_norm": norm}]} for norm in norms))) == 0.5
    assert _gradient_norm(replace(over, metrics=())) is None


def test_unknown_findings_are_refused_by_name():
    with pytest.raises(ConfigError, match="'magnitudes' is no finding"):
        chosen(["magnitudes"])


def test_findings_run_in_the_order_in_which_they_are_named():
    named = chosen(["ablation", "forgetting", "ablation"])
    assert [finding.name for finding in named] == ["ablation", "forgetting"]
    assert tuple(chosen(None)) == FINDINGS


def test_the_page_shows_claim_paper_figure_and_verdict(runner, tmp_path):
    found = run(tmp_path, ["ablation"])
    text = page(SMOKE, [replace(one, machine="one machine.") for one in found])
    assert "| both improve on freezing alone | +1.6 points (1.5B), +1.1 (7B) | +0.0 points [" in text
    assert "1 cannot be told at this scale" in text
    assert "one machine." in text
    rows = claims_csv(found).splitlines()
    assert len(rows) == 5
    assert rows[1].startswith('ablation,"S0, Table 4"')


def test_the_figure_has_a_row_for_every_claim(runner, tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    found = run(tmp_path, ["ablation", "length"])
    figure = figures.Figure()
    draw_claims(figure, found)
    labels = [[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes]
    assert [len(panel) for panel in labels] == [4, 3]  # points, then ratios
    assert labels[1][0] == "length: entropy selection lengthens responses"


def test_records_outlive_settings_that_are_added_and_not_those_that_are_changed():
    """What names a record holds the settings that differ from the schema's defaults, and no others."""
    config = decode(Config, {"method": {"name": "sft", "batch_size": 7}, "data": {"labels": ["a", "b"]}})
    said = beyond_defaults(config)
    assert said["method"] == {"": "SftMethod", "batch_size": 7}
    assert said["data"] == {"": "DataConfig", "labels": ["a", "b"]}
    assert "rollout" not in said
    assert json.loads(json.dumps(said)) == said
    other = beyond_defaults(decode(Config, {"method": {"name": "sft", "batch_size": 8}}))
    assert other != said
    assert "data" not in other


@pytest.mark.parametrize(("tier", "at_least"), [("mini", len(FINDINGS)), ("small", 17)])
def test_shipped_findings_are_those_of_the_tier_s_runs(tier, at_least):
    """`mifo paper --tier TIER` takes the committed records for its own."""
    folder = Path(__file__).parents[3] / "benchmarks" / "results" / f"paper-{tier}" / "findings"
    plan, found = Plan(tier=TIERS[tier], folder=Path(f"runs/paper-{tier}")), 0
    for finding in FINDINGS:
        trials = list(finding.trials(plan))
        record = folder / f"{finding.name}.json"
        if record.is_file():
            options = Options(folder=plan.folder, jobs=1, threads=1)
            work = suite._Work(plan=plan, finding=finding, options=options, stop=Stop(), say=print)
            assert json.loads(record.read_text())["key"] == work.key(trials), finding.name
            found += 1
    assert found >= at_least
