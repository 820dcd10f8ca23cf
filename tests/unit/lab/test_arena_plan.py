"""The runs of an arena: equal in everything but the method, and refused by name where they are not."""

import dataclasses
import math
from pathlib import Path

import pytest

from mifo.config.load import load_config, recipe_names
from mifo.errors import ConfigError
from mifo.lab.arena_file import BudgetConfig, read_arena
from mifo.lab.arena_plan import differing, final_run, grid, make_entries, tuning_runs, with_budget
from mifo.lab.arena_quick import quick_arena
from mifo.lab.arena_toml import config_toml
from mifo.methods import METHODS

EXAMPLE = Path(__file__).parents[3] / "arenas" / "embedded.toml"
FLOPS = BudgetConfig(flops=1e9)


def quick(methods, *, recipe="tiny", seeds=2, budget=FLOPS, tune=True):
    return quick_arena(recipe, methods, seeds=seeds, budget=budget, tune=tune, reference=None)


@pytest.fixture(scope="module")
def embedded():
    arena = read_arena(EXAMPLE)
    return arena, make_entries(arena, "runs")


def test_the_shipped_arena_is_fair(embedded):
    arena, entries = embedded
    budget = arena.settings.budget.flops
    assert budget
    assert differing({entry.name: entry.config for entry in entries}) == {}
    for entry in entries:
        train = entry.config.train
        assert (train.max_flops, train.minutes, train.max_tokens) == (budget, None, None)
        assert train.steps >= 48_000  # FLOPs end it, not steps
        assert entry.config.data.evaluation == "embedded:test"
        assert entry.config.run.export


def test_final_runs_differ_in_seed_alone(embedded):
    _, entries = embedded
    first, second = final_run(entries[0], 0), final_run(entries[0], 1)
    assert (first.name, second.name) == ("mifo-seed0", "mifo-seed1")
    same = dataclasses.replace(second.config, train=first.config.train, run=first.config.run)
    assert same == first.config


def test_every_method_gets_the_same_number_of_points(embedded):
    arena, entries = embedded
    kinds = {entry.name: set(entry.optimizers) for entry in entries}
    assert kinds["mifo"] == kinds["sft_rl"] == {"rl", "sft"}
    assert kinds["sft"] == {"sft"}
    assert kinds["grpo"] == kinds["luffy"] == {"rl"}
    tuning = arena.settings.tuning
    number = len(tuning.one_rate)
    assert number == len(tuning.two_rates) > 1
    for entry in entries:
        points = tuning_runs(arena, entry)
        assert len(points) == len({run.rates for _, run in points}) == number
        base = entry.config.rl_optimizer.learning_rate, entry.config.sft_optimizer.learning_rate
        for (rl, sft), run in points:
            assert run.rates == (pytest.approx(base[0] * rl), pytest.approx(base[1] * sft))
            assert "rl" in entry.optimizers or rl == 1.0
            assert "sft" in entry.optimizers or sft == 1.0


def test_the_grid_never_sees_the_test_problems(embedded):
    arena, entries = embedded
    for _, run in tuning_runs(arena, entries[0]):
        assert run.config.data.evaluation == "embedded:validation"
        assert run.config.data.evaluation_problems == 100
        assert run.config.train.max_flops == arena.settings.budget.flops * arena.settings.tuning.budget_share
        assert run.seed == run.config.train.seed == 1000
        assert not run.config.run.export
        assert not run.config.evaluation.around_sft
        assert run.config.evaluation.every_flops is None


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"flops": 4e9}, {"max_flops": 2e9, "steps": 48_000}),
        ({"tokens": 101}, {"max_tokens": 51, "steps": 48_000}),
        ({"minutes": 3.0}, {"minutes": 1.5, "steps": 48_000}),
        ({"steps": 10}, {"steps": 5}),
    ],
)
def test_budgets(budget, expected):
    _, config = load_config("tiny", ["--train.minutes", "7"])
    train = with_budget(config, BudgetConfig(**budget), 0.5).train
    bounds = {"max_flops": None, "max_tokens": None, "minutes": None} | expected
    assert {name: getattr(train, name) for name in bounds} == bounds


def test_a_difference_is_refused_by_name_or_allowed(tmp_path):
    text = """
    [budget]
    steps = 8
    [methods.mifo]
    recipe = "tiny"
    [methods.hot]
    recipe = "tiny"
    settings = { rollout = { temperature = 0.7 } }
    """
    path = tmp_path / "unfair.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_entries(read_arena(path), "runs")
    assert "rollout.temperature = 1.0 for mifo and 0.7 for hot" in str(caught.value)
    assert "allow_different" in str(caught.value)
    for allowed in ("rollout.temperature", "rollout"):
        path.write_text(f'allow_different = ["{allowed}"]\n{text}')
        assert len(make_entries(read_arena(path), "runs")) == 2
    path.write_text(f'allow_different = ["rollout.temp"]\n{text}')
    with pytest.raises(ConfigError):
        make_entries(read_arena(path), "runs")


@pytest.mark.parametrize(
    ("table", "setting", "value"),
    [("model", "context", "128"), ("data", "train_problems", "79"), ("reward", "incorrect", "-1.0"),
     ("evaluation", "temperature", "0.5")],
)  # fmt: skip
def test_model_data_grader_and_evaluation_must_agree(tmp_path, table, setting, value):
    model = "smollm2-arithmetic" if table == "model" else "tiny"
    path = tmp_path / "unfair.toml"
    path.write_text(
        f'[budget]\nsteps = 70\n[methods.a]\nrecipe = "{model}"\n[methods.b]\nrecipe = "{model}"\n'
        f"settings = {{ {table} = {{ {setting} = {value} }} }}\n"
    )
    with pytest.raises(ConfigError, match=f"{table}.{setting}"):
        make_entries(read_arena(path), "runs")


def test_a_wrong_setting_names_its_method(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('[budget]\nsteps = 8\n[methods.odd]\nrecipe = "tiny"\nsettings = { method = { freeze_tpo = 1 } }\n')
    with pytest.raises(
        ConfigError, match=r"methods.odd: method.freeze_tpo is not a setting. Did you mean 'freeze_top'"
    ):
        make_entries(read_arena(path), "runs")


@pytest.mark.parametrize(
    "name", ["tiny", "smollm2-arithmetic", "mifo-dft-dapo", "qwen2.5-math-7b", "mifo-after-sft-smollm2"]
)
def test_a_configuration_survives_its_file(name, tmp_path):
    _, config = load_config(name)
    path = tmp_path / "run.toml"
    path.write_text(config_toml(config, 'a "quoted" text\nof two lines, and \x7f'), encoding="utf-8")
    recipe, again = load_config(str(path))
    assert again == config
    assert recipe.description == 'a "quoted" text\nof two lines, and \x7f'


STAGED = """
[budget]
flops = 1e12
[tuning]
budget_share = 0.5
two_rates = [[1, 1], [2, 3]]
one_rate = [1, 2]
[methods.mifo]
recipe = "smollm2-arithmetic"
[methods.after]
recipe = "mifo-after-sft-smollm2"
[methods.rejuvenated]
recipe = "rejuvenate-smollm2"
"""


def test_a_list_of_stages_has_the_budget_in_all_and_every_stage_its_share_of_the_grid(tmp_path):
    """Stages before the last keep their steps, the last has what the budget leaves; a factor is of every stage's rate."""
    path = tmp_path / "staged.toml"
    path.write_text(STAGED)
    arena = read_arena(path)
    _, after, rejuvenated = make_entries(arena, "runs")
    assert after.optimizers == rejuvenated.optimizers == ("rl", "sft")
    sft, mifo = final_run(after, 3, (2.0, 3.0)).config.by_stage
    assert (sft.train.steps, mifo.train.steps) == (24, 40_000)
    assert sft.train.max_flops == mifo.train.max_flops == 1e12
    recipe = load_config("mifo-after-sft-smollm2")[1].by_stage
    for own, before in zip((sft, mifo), recipe, strict=True):
        assert own.rl_optimizer.learning_rate == pytest.approx(2 * before.rl_optimizer.learning_rate)
        assert own.sft_optimizer.learning_rate == pytest.approx(3 * before.sft_optimizer.learning_rate)
    assert sft.train.seed == 3
    points = tuning_runs(arena, after)
    assert [run.config.train.max_flops for _, run in points] == [5e11, 5e11]
    assert [run.config.by_stage[0].train.steps for _, run in points] == [24, 24]
    assert points[1][1].rates == pytest.approx(tuple(f * r for f, r in zip((2, 3), points[0][1].rates, strict=True)))
    before = load_config("rejuvenate-smollm2")[1]
    assert rejuvenated.config.rejuvenation_before == before.rejuvenation_before
    path.write_text(config_toml(points[1][1].config, "as it is run"))
    assert load_config(str(path))[1] == points[1][1].config


def test_rates_of_the_last_stage_alone(tmp_path):
    """Where the stages before it are a start that all share: their rates stay, and the grid is of the last one's optimizers."""
    path = tmp_path / "staged.toml"
    path.write_text(STAGED.replace("[tuning]", '[tuning]\nstages = "last"'))
    arena = read_arena(path)
    mifo, after, rejuvenated = make_entries(arena, "runs")
    assert (mifo.optimizers, after.optimizers, rejuvenated.optimizers) == (("rl", "sft"), ("rl", "sft"), ("rl",))
    sft, last = final_run(after, 0, (2.0, 3.0)).config.by_stage
    before, own = load_config("mifo-after-sft-smollm2")[1].by_stage
    assert (sft.rl_optimizer, sft.sft_optimizer) == (before.rl_optimizer, before.sft_optimizer)
    assert last.sft_optimizer.learning_rate == pytest.approx(3 * own.sft_optimizer.learning_rate)
    assert [factors for factors, _ in tuning_runs(arena, rejuvenated)] == [(1.0, 1.0), (2.0, 1.0)]
    assert final_run(mifo, 0, (2.0, 3.0)).rates == pytest.approx(
        (2 * own.rl_optimizer.learning_rate, 3 * own.sft_optimizer.learning_rate)
    )


def test_a_second_model_s_rate_follows_rl_s_factor():
    arena = quick(["mifo-ppo-smollm2", "ppo", "prime", "mifo"], recipe="smollm2-arithmetic")
    entries = {entry.name: entry for entry in make_entries(arena, "runs")}
    for name, table in (
        ("mifo-ppo-smollm2", "critic_optimizer"),
        ("ppo", "critic_optimizer"),
        ("prime", "prm_optimizer"),
    ):
        own = final_run(entries[name], 0, (3.0, 1.0)).config
        before = getattr(entries[name].config, table).learning_rate
        assert getattr(own, table).learning_rate == pytest.approx(3 * before)
    assert final_run(entries["mifo"], 0, (3.0, 1.0)).config.critic_optimizer == entries["mifo"].config.critic_optimizer


def test_a_recipe_s_second_model_is_carried_over_and_its_optimizer_left_where_there_is_none(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "tiny"\n[method.scorer]\nname = "ppo"\n[critic_optimizer]\nlearning_rate = 1e-3\n')
    entries = {e.name: e for e in make_entries(quick(["mifo", "relift", "grpo"], recipe=str(path)), "runs")}
    assert entries["relift"].config.method.scorer == entries["mifo"].config.method.scorer
    assert entries["relift"].config.critic_optimizer.learning_rate == 1e-3
    assert entries["grpo"].scorers == frozenset()
    assert "scorer" in entries["relift"].note


def test_stages_may_stand_in_the_arena(tmp_path):
    path = tmp_path / "staged.toml"
    stages = '[[methods.two.settings.stages]]\nsteps = 2\nmethod = { name = "sft" }\n[[methods.two.settings.stages]]\n'
    path.write_text('[budget]\nsteps = 8\n[methods.two]\nrecipe = "tiny"\n' + stages)
    (entry,) = make_entries(read_arena(path), "runs")
    recipe = load_config("tiny")[1]
    assert [(s.method.name, s.train.steps) for s in entry.config.by_stage] == [("sft", 2), ("mifo", 6)]
    assert entry.config.by_stage[1].method == recipe.method
    path.write_text('[budget]\nsteps = 8\n[methods.two]\nrecipe = "tiny"\nsettings = { stages = 3 }\n')
    with pytest.raises(ConfigError, match=r"methods\.two: stages must be a list of tables"):
        make_entries(read_arena(path), "runs")


def test_the_arena_after_sft_gives_every_method_the_same_sft():
    entries = make_entries(read_arena(EXAMPLE.with_name("after-sft.toml")), "runs")
    assert len({repr(entry.config.by_stage[0]) for entry in entries}) == 1
    assert len({repr(entry.config.by_stage[1].method) for entry in entries}) == len(entries) == 9


def test_a_budget_in_steps_leaves_the_last_stage_some(tmp_path):
    path = tmp_path / "staged.toml"
    text = STAGED.replace("flops = 1e12", "steps = 60").replace("budget_share = 0.5", "budget_share = 1.0")
    path.write_text(text)
    _, after, _ = make_entries(read_arena(path), "runs")
    assert [stage.train.steps for stage in after.config.by_stage] == [24, 36]
    path.write_text(text.replace("steps = 60", "steps = 24"))
    with pytest.raises(
        ConfigError, match=r"methods\.after: the budget of 24 steps leaves nothing for the last of its stages"
    ):
        make_entries(read_arena(path), "runs")


def test_a_list_of_stages_gives_other_methods_nothing():
    with pytest.raises(ConfigError, match="mifo-after-sft-smollm2 is a list of stages"):
        quick(["mifo"], recipe="mifo-after-sft-smollm2")
    (entry,) = make_entries(quick(["mifo-after-sft-smollm2"], recipe="smollm2-arithmetic"), "runs")
    assert [stage.method.name for stage in entry.config.by_stage] == ["sft", "mifo"]


def test_methods_of_a_recipe_without_recipes_of_their_own():
    arena = quick(["mifo", "relift", "sft", "multi_stage", "srft"])
    entries = {entry.name: entry for entry in make_entries(arena, "runs")}
    base = entries["mifo"].config
    assert differing({name: entry.config for name, entry in entries.items()}) == {}
    assert entries["relift"].config.method.rl == base.method.rl
    assert entries["relift"].config.method.buffer_size == base.method.buffer_size
    assert entries["sft"].config.method.batch_size == base.method.sft_batch_size
    assert entries["srft"].config.method.prompts_per_step == base.method.rl.prompts_per_step
    assert "carried over from tiny" in entries["relift"].note
    assert "scorer" not in entries["relift"].note  # tiny has none to carry over
    assert not entries["mifo"].note
    assert base.data.evaluation_problems == 7  # all that the test split has
    assert arena.settings.tuning.validation_problems == 13
    assert arena.settings.test.out_of_distribution == "none"  # its characters cannot spell them


def test_methods_that_have_a_recipe_take_it():
    arena = quick(["mifo-dagger", "relift", "sft_rl", "chord"], recipe="smollm2-arithmetic")
    recipes = {c.name: c.recipe for c in arena.contestants}
    assert recipes == {
        "mifo-dagger": "mifo-dagger", "relift": "relift-smollm2", "sft_rl": "sft-rl-smollm2", "chord": "chord-smollm2",
    }  # fmt: skip
    assert all(len(grid(arena, entry)) == 2 for entry in make_entries(arena, "runs"))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"rl_with_sft"}))
def test_every_method_can_be_entered_by_name(name):
    (entry,) = make_entries(quick([name]), "runs")
    assert entry.config.method.name == name


def test_a_method_that_the_recipe_cannot_carry_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"methods\.rl_with_sft: method\.rl\.rollouts_per_prompt = 2 counts"):
        make_entries(quick(["rl_with_sft"]), "runs")


def test_names_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"'releft' is neither a method nor a recipe.*Did you mean 'relift'"):
        quick(["mifo", "releft"])
    assert "grpo-smollm2" in recipe_names()
    with pytest.raises(ConfigError, match="neither"):
        quick(["grpo-smollm2"])  # of another recipe
    with pytest.raises(ConfigError, match="takes its validation and test problems from the embedded data"):
        quick(["mifo"], recipe="gsm8k-smollm2")


def test_steps_of_repeating_stages_are_whole_cycles():
    entry = next(e for e in make_entries(quick(["multi_stage"]), "runs"))
    method = entry.config.method
    assert entry.config.train.steps % (method.sft_steps + method.rl_steps) == 0
    assert math.isfinite(entry.config.train.max_flops)
