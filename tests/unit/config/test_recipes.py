"""Every shipped recipe is read, checked, and says what its name promises."""

import dataclasses
import re

import pytest

from mifo.config.load import load_config, read_recipe, recipe_descriptions, recipe_names
from mifo.config.schema import GrpoMethod, MifoMethod, SftMethod
from mifo.data import tasks
from mifo.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_it_is_read_and_checked(name):
    recipe, config = load_config(name)
    assert recipe.name == recipe.source == name
    assert recipe.description
    assert "\n" not in recipe.description
    assert config.run.name is None  # the run folder is named after the recipe


@pytest.mark.parametrize("name", recipe_names())
def test_it_names_embedded_families_that_exist(name):
    data = load_config(name)[1].data
    assert set(data.families) <= set(tasks.FAMILIES)


def test_the_ablations_differ_from_mifo_in_nothing_else():
    _, base = load_config("smollm2-arithmetic")
    settings = {
        "mifo-int": {"token_fraction": 1.0, "freeze_top": 0.0},
        "mifo-es": {"token_fraction": 0.2, "freeze_top": 0.0},
        "mifo-pf": {"token_fraction": 1.0, "freeze_top": 0.5},
        "mifo-dagger": {"token_fraction": 0.2, "freeze_top": 0.5, "history": 0.0},
    }
    for name, changes in settings.items():
        _, config = load_config(name)
        assert isinstance(config.method, MifoMethod)
        assert config == dataclasses.replace(base, method=dataclasses.replace(base.method, **changes)), name


def test_the_baselines_share_model_data_and_optimizers():
    _, base = load_config("smollm2-arithmetic")
    _, grpo = load_config("grpo-smollm2")
    _, sft = load_config("sft-smollm2")
    assert isinstance(grpo.method, GrpoMethod)
    assert isinstance(sft.method, SftMethod)
    assert grpo.method.rl == base.method.rl
    for config in (grpo, sft):
        for table in ("model", "data", "rollout", "rl_optimizer", "sft_optimizer"):
            assert getattr(config, table) == getattr(base, table)
    assert grpo.train == base.train


@pytest.mark.parametrize("name", ["qwen2.5-math-1.5b", "qwen2.5-math-7b", "llama-3.1-8b"])
def test_the_published_set_up(name):
    """Appendix C of the paper, number by number."""
    _, config = load_config(name)
    method = config.method
    assert isinstance(method, MifoMethod)
    assert (method.rl.prompts_per_step, method.rl.rollouts_per_prompt, method.rl.updates_per_step) == (128, 8, 2)
    assert (method.rl.entropy_coefficient, method.rl.kl_coefficient, method.rl.advantage_std) == (0.001, 0.0, False)
    assert (method.accuracy_threshold, method.buffer_size) == (1 / 8, 64)
    assert (method.token_fraction, method.freeze_top, method.history) == (0.2, 0.5, 0.5)
    assert config.rl_optimizer.learning_rate == 1e-6
    assert config.rollout.temperature == 1.0
    assert config.rollout.max_response_tokens == config.evaluation_tokens == 8192
    assert config.evaluation.temperature == 0.6
    assert config.data.template == "luffy"
    assert config.data.train == "Elliott/Openr1-Math-46k-8192"
    assert config.train.steps == 3 * 46_000 // 128
    stretched = (config.model.rope_theta, config.model.context) == (40_000, 16_384)
    assert stretched == name.startswith("qwen")


def test_tiny_is_small_and_has_half_filled_buffers():
    _, config = load_config("tiny")
    method = config.method
    assert config.model.path == "tiny"
    assert method.rl.prompts_per_step < method.buffer_size
    assert method.sft_batch_size < method.buffer_size
    assert 0 < method.token_fraction < 1
    assert method.freeze_top > 0
    assert config.data.train_problems >= method.buffer_size  # the buffer holds a question once


def test_paper_recipes_need_no_network_to_be_read():
    for name in recipe_names():
        tables = read_recipe(name).tables
        assert re.fullmatch(r"[\w./-]+", tables["model"]["path"])


MIXED = [
    "relift", "luffy", "rl-with-sft", "hpt", "superrl", "chord", "chord-mu", "chord-constant", "sft-rl", "rl-sft", "multi-stage",
    "uft", "uft-stage", "uft-r3", "prefix-rft", "bread", "sasr",
]  # fmt: skip


@pytest.mark.parametrize("name", [*MIXED, "srft"])
def test_methods_share_what_a_fair_comparison_needs(name):
    """Same model, data, grading, rollouts, optimizers and policy gradient; the method alone differs."""
    _, base = load_config("smollm2-arithmetic")
    _, config = load_config(f"{name}-smollm2")
    for table in ("model", "data", "reward", "rollout", "rl_optimizer", "sft_optimizer", "evaluation"):
        assert getattr(config, table) == getattr(base, table)
    if name == "srft":
        sampled = (config.method.prompts_per_step, config.method.rollouts_per_prompt)
        assert sampled == (base.method.rl.prompts_per_step, base.method.rl.rollouts_per_prompt)
    else:
        assert config.method.rl == base.method.rl
    assert dataclasses.replace(config.train, steps=base.train.steps) == base.train


@pytest.mark.parametrize("name", ["ppo", "orz", "prime", "oat-zero"])
def test_methods_with_a_second_model_share_it_too(name):
    """The same, but that Oat-Zero and Open-Reasoner-Zero are defined by a reward and a normaliser."""
    _, base = load_config("grpo-smollm2")
    _, config = load_config(f"{name}-smollm2")
    for table in ("model", "data", "rollout", "rl_optimizer", "evaluation", "train"):
        assert getattr(config, table) == getattr(base, table)
    rewards = {"orz": 0.0, "oat-zero": 0.0}
    assert config.reward == dataclasses.replace(base.reward, truncated=rewards.get(name))
    normalizer = "constant" if name == "oat-zero" else "token"
    assert config.method.rl == dataclasses.replace(base.method.rl, normalizer=normalizer)


def test_published_settings_with_a_second_model():
    ppo = load_config("ppo-qwen2.5-math-7b")[1]
    assert (ppo.method.discount, ppo.method.gae_lambda, ppo.method.value_clip) == (1.0, 1.0, 0.5)
    assert (ppo.rl_optimizer.learning_rate, ppo.critic_optimizer.learning_rate) == (1e-6, 1e-5)
    orz = load_config("orz-qwen2.5-7b")[1]
    rl = orz.method.rl
    assert (rl.prompts_per_step, rl.rollouts_per_prompt, rl.updates_per_step) == (128, 64, 1)
    assert (rl.kl_coefficient, rl.entropy_coefficient, rl.clip_low, rl.clip_high) == (0.0, 0.0, 0.2, 0.2)
    assert (orz.method.discount, orz.method.gae_lambda, orz.method.whiten) == (1.0, 1.0, True)
    assert (orz.method.critic_updates_per_step, orz.method.value_clip) == (12, 0.2)
    assert (orz.rl_optimizer.learning_rate, orz.critic_optimizer.learning_rate) == (1e-6, 5e-6)
    assert orz.rl_optimizer.warmup_updates == orz.critic_optimizer.warmup_updates == 50
    assert (orz.rollout.max_response_tokens, orz.reward.truncated) == (8000, 0.0)
    prime = load_config("prime-qwen2.5-math-7b")[1]
    method = prime.method
    assert (method.rl.prompts_per_step, method.rl.rollouts_per_prompt, method.rl.dynamic_sampling) == (256, 4, True)
    assert (method.beta, method.least_accuracy, method.most_accuracy) == (0.05, 0.2, 0.8)
    assert (method.prm_update, method.dense_baseline, method.dense_coefficient) == ("after", "scaled", 1.0)
    assert (prime.rl_optimizer.learning_rate, prime.prm_optimizer.learning_rate) == (5e-7, 1e-6)
    assert (prime.prm_optimizer.clip_norm, prime.rollout.max_response_tokens) == (10.0, 3072)
    oat = load_config("oat-zero-qwen2.5-math-7b")[1]
    rl = oat.method.rl
    assert (rl.prompts_per_step, rl.rollouts_per_prompt, rl.updates_per_step) == (128, 8, 8)
    assert (rl.normalizer, rl.constant_tokens, rl.advantage_std) == ("constant", 3000, False)
    assert (oat.rollout.max_response_tokens, oat.reward.truncated, oat.evaluation.temperature) == (3000, 0.0, 0.0)
    assert oat.rl_optimizer.learning_rate == 1e-6


@pytest.mark.parametrize("name", ["relift", "luffy", "rl-with-sft", "hpt"])
def test_published_settings_of_the_unclipped_family(name):
    _, config = load_config(f"{name}-qwen2.5-math-7b")
    rl = config.method.rl
    assert (rl.clip_low, rl.clip_high, rl.normalizer, rl.advantage_std) == (None, None, "constant", False)
    assert (rl.prompts_per_step, rl.rollouts_per_prompt, rl.entropy_coefficient) == (128, 8, 0.001)
    assert config.rl_optimizer.learning_rate == (5e-6 if name == "hpt" else 1e-6)
    assert config.rl_optimizer.clip_norm == (0.7 if name == "relift" else 1.0)


def test_published_schedules_of_chord():
    schedules = {
        "chord": (200, 400, 0.5, 0.02, "chord_phi"),
        "chord-mu": (0, 200, 0.9, 0.05, "cross_entropy"),
        "chord-constant": (0, 0, 0.1, 0.1, "chord_phi"),
    }
    for name, expected in schedules.items():
        method = load_config(f"{name}-qwen2.5-math-7b")[1].method
        mu = (method.mu_warmup_steps, method.mu_decay_steps, method.mu_peak, method.mu_valley, method.sft.loss)
        assert mu == expected
        assert (method.rl.prompts_per_step * method.rl.rollouts_per_prompt, method.demonstrations_per_step) == (256, 64)


@pytest.mark.parametrize(("steps", "rate"), [(500, 1e-6), (50, 5e-6)])
def test_corrected_sft_then_rl(steps, rate):
    _, config = load_config(f"sft-rl-{steps}-qwen2.5-math-7b")
    assert config.method.sft_steps == 3 * 46_000 // 64
    assert config.train.steps - config.method.sft_steps == steps
    assert (config.rl_optimizer.learning_rate, config.sft_optimizer.learning_rate) == (rate, 5e-5)
    assert (config.method.rl.clip_low, config.method.rl.clip_high) == (0.2, 0.28)
    assert config.sft_optimizer.decay_updates == config.method.sft_steps


def test_rejuvenation_between_sft_and_rl():
    """The shipped stages share what a fair comparison needs; the published ones are those of S3's mathematical setting."""
    _, base = load_config("grpo-smollm2")
    _, config = load_config("rejuvenate-smollm2")
    assert config.method_name == "sft → rejuvenate → grpo"
    assert config.stages[2].method == base.method
    for stage in config.by_stage:
        for table in ("model", "data", "reward", "rollout", "rl_optimizer", "sft_optimizer", "evaluation"):
            assert getattr(stage, table) == getattr(base, table)
    _, mifo = load_config("mifo-rejuvenated-smollm2")
    _, plain = load_config("smollm2-arithmetic")
    assert mifo.rejuvenation.every_intervals == 2
    assert dataclasses.replace(mifo, rejuvenation=plain.rejuvenation) == plain
    _, config = load_config("rejuvenate-qwen2.5-math-7b")
    sft, rl = config.by_stage
    assert (sft.sft_optimizer.learning_rate, sft.sft_optimizer.weight_decay, sft.sft_optimizer.schedule) == (
        3e-6,
        0.0,
        "constant",
    )
    assert sft.train.steps * sft.method.batch_size == 32 * 46_000
    settings = config.rejuvenation_before[1]
    assert (settings.alpha, settings.rho, settings.targets, settings.samples, settings.base) == (
        0.5,
        0.01,
        16,
        64,
        None,
    )
    method = rl.method.rl
    assert (method.prompts_per_step, method.rollouts_per_prompt, method.updates_per_step) == (512, 8, 4)
    assert (method.normalizer, method.kl_coefficient, method.clip_low, method.clip_high) == (
        "sequence",
        0.001,
        0.2,
        0.2,
    )
    assert (config.reward.correct, config.reward.incorrect, config.rl_optimizer.learning_rate) == (1.0, -1.0, 1e-6)
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (512, 1024)


def test_published_settings_of_methods_that_continue_demonstrations():
    uft = load_config("uft-qwen2.5-math-7b")[1].method
    rl = uft.rl
    assert (rl.prompts_per_step, rl.rollouts_per_prompt, rl.updates_per_step) == (256, 4, 4)
    assert (rl.advantage_std, rl.kl_coefficient, rl.entropy_coefficient) == (True, 0.001, 0.001)
    assert (uft.hint_coefficient, uft.hint_chunks, uft.hint_steps) == (0.001, 5, 300)
    assert (uft.hint_low, uft.hint_high, uft.hints) == (0.05, 0.95, "binomial")
    _, config = load_config("prefix-rft-qwen2.5-math-7b")
    prefix = config.method
    assert (prefix.rl.prompts_per_step, prefix.rl.rollouts_per_prompt, prefix.rl.clip_low) == (128, 8, 0.2)
    assert (prefix.prefix_low_start, prefix.prefix_low_end, prefix.prefix_high) == (0.95, 0.05, 0.95)
    assert (prefix.prefix_decay_steps, prefix.prefix_token_fraction, prefix.advantage) == (500, 0.2, "shared")
    assert config.train.steps == 5 * 46_000 // 128
    bread = load_config("bread-qwen2.5-math-7b")[1].method
    assert (bread.episodes, bread.success_low, bread.success_high) == (10, 0.0, 0.8)
    _, config = load_config("sasr-qwen2.5-math-7b")
    assert (config.method.gamma, config.method.warmup_steps) == (1.0, 46_000 // config.method.sft_batch_size)


def test_the_forms_of_uft():
    stage, r3 = (load_config(f"uft-{form}-smollm2")[1].method for form in ("stage", "r3"))
    assert (stage.hints, stage.hint_coefficient) == ("stage", 0.001)
    assert (r3.hints, r3.hint_coefficient) == ("uniform", 0.0)


def sft_of(name):
    """(batch, loss, updates a batch) and the optimizer's (rate, decay, warm-up, end, lowest share, clip) of an SFT recipe."""
    _, config = load_config(name)
    method, optimizer = config.method, config.sft_optimizer
    assert isinstance(method, SftMethod)
    assert method.token_fraction == 1.0
    assert not config.data.verify_demonstrations
    schedule = (optimizer.schedule, optimizer.warmup_updates, optimizer.decay_updates)
    assert config.train.steps * method.sft.updates_per_batch >= (optimizer.decay_updates or 0)
    return (method.batch_size, method.sft.loss, method.sft.updates_per_batch), (optimizer.learning_rate, *schedule)


def test_published_settings_of_the_imitation_losses():
    """Rate, batch and schedule of each code."""
    assert sft_of("dft-qwen2.5-math-1.5b") == ((256, "dft", 1), (5e-5, "cosine", 39, 390))
    assert sft_of("gem-qwen2.5-math-7b") == ((128, "gem", 1), (2e-5, "cosine", 70, 2343))
    assert sft_of("psft-qwen2.5-7b-instruct") == ((64, "psft", 8), (1e-6, "constant", 80, None))
    assert sft_of("asft-qwen2.5-7b") == ((64, "asft", 1), (2e-5, "constant", 0, None))
    assert sft_of("eaft-qwen2.5-0.5b-instruct") == ((16, "eaft", 1), (1e-5, "cosine", 19, 187))
    dft = load_config("dft-qwen2.5-math-1.5b")[1].sft_optimizer
    assert (dft.beta1, dft.beta2, dft.weight_decay, dft.clip_norm) == (0.9, 0.95, 0.01, 1.0)
    gem, asft, eaft = (
        load_config(n)[1].method.sft for n in ("gem-qwen2.5-math-7b", "asft-qwen2.5-7b", "eaft-qwen2.5-0.5b-instruct")
    )
    assert (gem.gem_beta, gem.gem_weight, asft.asft_kl, eaft.eaft_alpha) == (0.7, "logsigmoid", 0.05, 1.0)
    assert load_config("psft-qwen2.5-7b-instruct")[1].sft_optimizer.weight_decay == 0.1


@pytest.mark.parametrize(
    ("name", "sampled", "rate", "settings"),
    [
        (
            "dr-grpo-qwen2.5-math-7b", (128, 8, 1), 1e-6,
            {"normalizer": "constant", "constant_tokens": 3000, "advantage_std": False},
        ),
        (
            "dapo-qwen2.5-32b",
            (512, 16, 16),
            1e-6,
            {
                "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "overlong_tokens": 4096, "dynamic_prompts": 1536,
                "dynamic_rounds": 10, "advantage_std": True, "normalizer": "token",
            },
        ),
        (
            "gspo-qwen2.5-3b-instruct", (512, 16, 4), 1e-6,
            {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "normalizer": "sequence"},
        ),
        ("cispo-qwen3-8b", (1024, 5, 4), 1e-6, {"clip": "weight", "clip_low": None, "clip_high": 0.2, "kl_coefficient": 0.001}),
        ("rloo-qwen2-7b-instruct", (1024, 5, 4), 1e-6, {"advantage": "rloo", "kl_coefficient": 0.001}),
        ("reinforce-qwen3-8b", (1024, 8, 1), 3e-6, {"advantage": "reinforce", "normalizer": "token"}),
        ("reinforce-baseline-qwen3-8b", (1024, 8, 1), 3e-6, {"advantage": "reinforce_baseline", "normalizer": "token"}),
    ],
)  # fmt: skip
def test_published_settings_of_the_rl_variants(name, sampled, rate, settings):
    """RL's settings of each code."""
    _, config = load_config(name)
    assert isinstance(config.method, GrpoMethod)
    rl = config.method.rl
    assert (rl.prompts_per_step, rl.rollouts_per_prompt, rl.updates_per_step) == sampled
    assert config.rl_optimizer.learning_rate == rate
    assert rl.entropy_coefficient == 0.0
    assert {field: getattr(rl, field) for field in settings} == settings
    assert config.reward.incorrect == (-1.0 if name.startswith("dapo") else 0.0)


def test_every_loss_and_variant_has_a_recipe_on_the_embedded_model_and_a_published_one():
    names = recipe_names()
    own = [
        "grpo",
        "sft",
        "dft",
        "gem",
        "psft",
        "asft",
        "eaft",
        "dr-grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce",
        "reinforce-baseline",
    ]
    forms = {"uft-stage", "uft-r3"}  # whose published recipe is that of the method
    for variant in {*own, *MIXED, "srft"} - forms:
        assert f"{variant}-smollm2" in names
        assert [n for n in names if re.fullmatch(rf"{variant}(-50+)?-(qwen|llama).*", n)], variant


def test_descriptions_are_those_of_the_recipes():
    assert recipe_descriptions() == [(name, read_recipe(name).description) for name in recipe_names()]
    assert all(description for _, description in recipe_descriptions())


@pytest.mark.parametrize(
    ("method", "table", "kept"),
    [
        ('scorer = "none"', "critic_optimizer", False),
        ('[method.scorer]\nname = "prime"', "critic_optimizer", False),
        ("freeze_top = 0.3", "critic_optimizer", True),
    ],
)
def test_a_table_whose_second_model_was_taken_away_is_not_inherited(tmp_path, method, table, kept):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "mifo-ppo-smollm2"\n[method]\n{method}\n')
    if "prime" not in method:  # its settings are another's: the table is written anew
        load_config(str(path))
    assert (table in read_recipe(str(path)).tables) == kept
    path.write_text('extends = "mifo-ppo-smollm2"\n[critic_optimizer]\nbeta2 = 0.9\n[method]\nscorer = "none"\n')
    with pytest.raises(ConfigError, match=r"\[critic_optimizer\] is set"):  # written beside, so it is a mistake
        load_config(str(path))
