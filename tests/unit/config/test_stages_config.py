"""Stages of a recipe, adapters and control: what they inherit, and what is refused with its remedy."""

import json
import re

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode, encode
from mifo.config.describe import reference_page
from mifo.config.help import settings_help
from mifo.config.load import load_config
from mifo.config.schema import Config, GrpoMethod, MifoMethod, SftMethod
from mifo.config.stages import with_stages
from mifo.errors import ConfigError

LORA = {"lora_rank": 8}
CONTROL = {"target_drop": 0.02}
CASES = [
    ({"method": {"name": "mifo", "sft": {"lora_alpha": 64.0}}}, "lora_alpha = 64 has no effect without"),
    ({"method": {"name": "chord", "sft": LORA}}, "'chord', whose updates learn demonstrations and rollouts together"),
    ({"method": {"name": "hpt", "sft": LORA}}, "Leave lora_rank out"),
    ({"method": {"name": "mifo", "sft": LORA, "freeze": "grad_zero"}}, "Leave freeze at 'hard'"),
    ({"method": {"name": "mifo", "sft": LORA, "optimizers": "shared"}}, "Use 'separate'"),
    ({"method": {"name": "sft", "sft": LORA}, "train": {"gradient_drop": 0.5}}, "gradient_drop = 0.5 with"),
    ({"method": {"name": "sft", "sft": {"lora_rank": 0}}}, "method.sft.lora_rank = 0 must be at least 1"),
    ({"method": {"name": "mifo", "control": {"gain": 2.0}}}, "method.control.gain = 2 has no effect without"),
    ({"method": {"name": "mifo", "control": CONTROL}, "evaluation": {"around_sft": False}}, "around_sft = false"),
    ({"method": {"name": "mifo", "control": CONTROL}, "data": {"evaluation": "none"}}, "data.evaluation = 'none'"),
    ({"method": {"name": "mifo", "freeze_top": 0.99, "control": CONTROL}}, "freeze_top = 0.99, where control starts"),
    ({"method": {"name": "mifo", "control": CONTROL | {"freeze_min": 0.5, "freeze_max": 0.5}}}, "nothing to move"),
    ({"method": {"name": "mifo", "control": CONTROL | {"token_min": 0.1}}}, "token_min = 0.1 has no effect with"),
    (
        {"method": {"name": "mifo", "control": CONTROL | {"token_gain": 1.0, "token_min": 0.3}}},
        "token_fraction = 0.2, where",
    ),
    (
        {"method": {"name": "mifo", "control": {"target_drop": 1.5}}},
        "target_drop = 1.5 must be at least -1 and at most 1",
    ),
]


@pytest.mark.parametrize(("tables", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(tables, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(decode(Config, tables))


@pytest.mark.parametrize(
    "tables",
    [{"method": {"name": name, "sft": LORA}} for name in ("sft", "sft_rl", "rl_sft", "multi_stage", "relift", "mifo")]
    + [
        {"method": {"name": "mifo", "freeze_top": 0.0, "control": CONTROL}},
        {"method": {"name": "mifo", "control": CONTROL | {"freeze_min": 0.5, "freeze_max": 0.5, "token_gain": 1.0}}},
    ],
)
def test_the_remedy_works(tables):
    check_config(decode(Config, tables))


BASE = """
extends = "tiny"
[method]
freeze_top = 0.25
[rl_optimizer]
learning_rate = 5e-4
"""
STAGES = """
[[stages]]
steps = 3
[stages.method]
name = "sft"
batch_size = 7
[stages.sft_optimizer]
learning_rate = 2e-3
[[stages]]
[stages.method]
buffer_size = 32
"""


def load(tmp_path, text, flags=()):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return load_config(str(path), flags)[1]


def test_a_stage_takes_what_it_leaves_out_from_the_run(tmp_path):
    config = load(tmp_path, BASE + STAGES)
    first, second = config.by_stage
    assert isinstance(first.method, SftMethod)
    assert (first.method.batch_size, first.train.steps) == (7, 3)
    assert (first.sft_optimizer.learning_rate, first.sft_optimizer.beta2) == (2e-3, 0.95)
    assert first.rl_optimizer.learning_rate == second.rl_optimizer.learning_rate == 5e-4
    assert isinstance(second.method, MifoMethod)
    assert (second.method.buffer_size, second.method.freeze_top, second.method.sft_batch_size) == (32, 0.25, 4)
    assert second.sft_optimizer.learning_rate == 1e-3
    assert second.train.steps == 48  # tiny's
    assert config.steps == 51
    assert config.method_name == "sft → mifo"
    for stage in (first, second):
        assert (stage.model, stage.data, stage.stages) == (config.model, config.data, ())


def test_a_run_without_stages_is_its_own_only_one():
    config = load_config("tiny")[1]
    assert config.by_stage == (config,)
    assert (config.steps, config.method_name) == (config.train.steps, "mifo")


def test_stages_survive_the_way_to_json_and_back(tmp_path):
    config = load(tmp_path, BASE + STAGES)
    assert decode(Config, json.loads(json.dumps(encode(config)))) == config


def test_flags_hold_for_the_whole_run(tmp_path):
    config = load(tmp_path, BASE + STAGES, ["--train.seed", "5", "--evaluation.around-sft", "--run.name=x"])
    assert {stage.train.seed for stage in config.by_stage} == {5}
    assert [stage.method.name for stage in config.by_stage] == ["sft", "mifo"]


@pytest.mark.parametrize(
    "flag", ["--method.freeze-top", "--train.steps=3", "--rl-optimizer.learning-rate", "--method.rl.clip_low"]
)
def test_flags_that_each_stage_has_of_its_own(tmp_path, flag):
    with pytest.raises(ConfigError, match=r"is not a flag of a run with stages: each of its 2 stages"):
        load(tmp_path, BASE + STAGES, [flag, "0.5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[stages]]\n[stages.model]\npath = "x"', r"stages\[1\]\.model cannot differ by stage"),
        ("[[stages]]\n[[stages]]\n[stages.data]\nlevels = 1", r"stages\[2\]\.data cannot differ by stage"),
        ("[[stages]]\nstep = 1", r"stages\[1\]\.step is not a setting of a stage\. Did you mean 'steps'"),
        ("[[stages]]\n[stages.train]\nsteps = 1", r"stages\[1\]\.train cannot differ"),
        ("[stages]\nsteps = 1", r"write \[\[stages\]\] above the settings of each stage"),
        ("[[stages]]\nsteps = 0", r"stages\[1\]\.steps = 0 must be at least 1"),
        ('[[stages]]\n[stages.method]\nname = "sftt"', r"stages\[1\]\.method\.name = 'sftt' is not known"),
        ("[[stages]]\n[stages.rl_optimizer]\nbeta2 = 1.0", r"stages\[1\]\.rl_optimizer\.beta2 = 1\.0 must be"),
        (
            "[[stages]]\n[[stages]]\n[stages.method]\nsft_batch_size = 99",
            r"in stages\[2\]: method\.sft_batch_size = 99",
        ),
    ],
)
def test_mistakes_in_stages(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f'extends = "tiny"\n{text}')


REJUVENATE = "[[stages]]\n[stages.rejuvenate]\n"
GRPO = '[[stages]]\nsteps = 4\n[stages.method]\nname = "grpo"\n'
SFT = '[[stages]]\nsteps = 2\n[stages.method]\nname = "sft"\nbatch_size = 7\n'


def test_a_stage_that_rejuvenates_trains_nothing(tmp_path):
    config = load(tmp_path, BASE + SFT + REJUVENATE + "alpha = 0.25\n" + GRPO)
    assert config.method_name == "sft → rejuvenate → grpo"
    assert [stage.method.name for stage in config.by_stage] == ["sft", "grpo"]
    assert (config.steps, config.stage_numbers) == (6, (1, 3))
    before = config.rejuvenation_before
    assert before[0] is None
    assert (before[1].alpha, before[1].rho, before[1].targets, before[1].samples) == (0.25, 0.01, 16, 64)
    assert config.rejuvenations == (before[1],)
    stored = json.loads(json.dumps(encode(config)))
    assert decode(Config, stored) == decode(Config, with_stages(stored)) == config
    assert load(tmp_path, BASE).rejuvenations == ()


def test_rejuvenation_between_intervals_may_stand_beside_a_stage(tmp_path):
    between = "[rejuvenation]\nevery_intervals = 3\nrho = 0.0\n"
    config = load(tmp_path, BASE + between + SFT + REJUVENATE + '[[stages]]\n[stages.method]\nname = "mifo"\n')
    assert [settings.rho for settings in config.rejuvenations] == [0.01, 0.0]
    assert config.rejuvenation.every_intervals == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SFT + REJUVENATE, r"stages\[2\]\.rejuvenate is the last of 2 stages.*Add a stage behind it"),
        (REJUVENATE, r"stages\[1\]\.rejuvenate is the last of 1 stages"),
        (REJUVENATE + GRPO, r"stages\[1\]\.rejuvenate comes before anything is trained.*stages\[1\]\.rejuvenate\.base"),
        (SFT + REJUVENATE + REJUVENATE + GRPO, r"stages\[2\]\.rejuvenate is followed by another rejuvenation"),
        (SFT + REJUVENATE + "alpha = 1.0\nrho = 0.0\n" + GRPO, r"stages\[2\]\.rejuvenate\.alpha = 1 with .* leaves every weight"),
        (SFT + REJUVENATE + "alpha = 0.0\n" + GRPO, r"alpha = 0 gives back the base"),
        (SFT + REJUVENATE + "alpha = 1.5\n" + GRPO, r"stages\[2\]\.rejuvenate\.alpha = 1\.5 must be at least 0 and at most 1"),
        (SFT + REJUVENATE + "rho = 0.0\nsigned = true\n" + GRPO, r"rejuvenate\.signed = true has no effect with"),
        (SFT + REJUVENATE + "rho = 0.0\nper_module_quota = true\n" + GRPO, r"per_module_quota = true has no effect"),
        (SFT + REJUVENATE + "every_intervals = 2\n" + GRPO, r"stages\[2\]\.rejuvenate\.every_intervals is not a setting"),
        (SFT + "[[stages]]\nsteps = 3\n[stages.rejuvenate]\n" + GRPO, r"stages\[2\]\.steps has no effect with stages\[2\]"),
        (SFT + REJUVENATE + '[stages.method]\nname = "sft"\n' + GRPO, r"stages\[2\]\.method has no effect"),
        (SFT + REJUVENATE + "[[stages]]\n[stages.method]\nsft_batch_size = 99", r"in stages\[3\]: method\.sft_batch_size = 99"),
        ("[rejuvenation]\nalpha = 0.25", r"rejuvenation\.alpha = 0\.25 has no effect without rejuvenation\.every_intervals"),
        ("[rejuvenation]\nevery_intervals = 0", r"rejuvenation\.every_intervals = 0 must be at least 1"),
        ("[rejuvenation]\nevery_intervals = 1\nalpha = 1.0\nrho = 0.0", r"rejuvenation\.alpha = 1 with rejuvenation\.rho = 0"),
        (
            '[method]\nname = "grpo"\n[rejuvenation]\nevery_intervals = 1',
            r"every_intervals = 1 with method\.name = 'grpo', which never returns.*Use mifo, relift, multi_stage",
        ),
        ("[rejuvenation]\nevery_intervals = 1\n" + SFT + GRPO, r"with method\.name = 'sft', 'grpo', which never returns"),
        (
            '[method]\nname = "multi_stage"\nsft_steps = 2\nrl_steps = 2\n[train]\nsteps = 8\n'
            "[rejuvenation]\nevery_intervals = 3",
            r"every_intervals = 3 never comes with 2 cycles",
        ),
    ],
)  # fmt: skip
def test_rejuvenations_that_cannot_be(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f'extends = "tiny"\n{text}')


def test_an_inherited_list_of_stages_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "base.toml").write_text(BASE + STAGES)
    config = load(tmp_path, 'extends = "base.toml"\n[[stages]]\nsteps = 2\n[stages.method]\nname = "grpo"')
    assert [type(stage.method) for stage in config.by_stage] == [GrpoMethod]


def test_help_and_reference_have_stages(tmp_path):
    assert "--stages" not in settings_help(load(tmp_path, BASE + STAGES), width=80, all_methods=True)
    page = reference_page()
    assert "## [[stages]]" in page
    assert "| `stages.steps` | whole number, at least 1 | `train.steps` |" in page


@pytest.mark.parametrize(
    ("name", "names"), [("mifo-after-sft-smollm2", "sft → mifo"), ("relift-after-mifo-smollm2", "mifo → relift")]
)
def test_shipped_stages_share_what_a_fair_comparison_needs(name, names):
    _, base = load_config("smollm2-arithmetic")
    _, config = load_config(name)
    assert config.method_name == names
    for stage in config.by_stage:
        for table in ("model", "data", "reward", "rollout", "rl_optimizer", "sft_optimizer", "evaluation"):
            assert getattr(stage, table) == getattr(base, table)
        if not isinstance(stage.method, SftMethod):
            assert stage.method.rl == base.method.rl
    assert base.method in [stage.method for stage in config.by_stage]


@pytest.mark.parametrize("name", ["mifo", "relift", "sft-rl"])
def test_shipped_adapters_are_the_papers(name):
    base = {"mifo": "smollm2-arithmetic"}.get(name, f"{name}-smollm2")
    _, config = load_config(f"{name}-lora-smollm2")
    assert (config.method.sft.lora_rank, config.method.sft.lora_alpha) == (64, 128.0)
    plain = encode(config)
    plain["method"]["sft"] |= {"lora_rank": "none"}
    assert decode(Config, plain) == load_config(base)[1]
