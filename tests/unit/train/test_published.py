"""The sums of published codes: by hand, against loops over their micro-batches, out of reach but for recipes that name them."""

import dataclasses
import itertools

import pytest
import torch
from test_invariance import gradient
from test_mixed_oracle import make_groups, mean, on_policy, stats

from mifo.config.check import check_config
from mifo.config.decode import decode, encode
from mifo.config.legacy import LegacyConfig, in_force, warning
from mifo.config.load import load_config, read_recipe, recipe_names
from mifo.config.schema import Config
from mifo.core.reduce import published_micro_batches, published_scales
from mifo.errors import ConfigError
from mifo.methods import METHODS, make_method
from mifo.methods.published import AsPublished
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import Phase, PublishedSum

GPUS, TOKENS, LENGTH = 2, 60, 50
SUMS = {"gpus": GPUS, "micro_batch_tokens": TOKENS}
RL = {
    "prompts_per_step": 4, "updates_per_step": 1, "rollouts_per_prompt": 4, "entropy_coefficient": 0.25,
    "normalizer": "constant", "constant_tokens": LENGTH, "clip_low": "none", "clip_high": "none",
}  # fmt: skip


def rule(kind, gpus=2, tokens=10):
    return PublishedSum(kind=kind, gpus=gpus, tokens=tokens)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_micro_batches_by_hand():
    assert published_micro_batches([4, 5, 2, 9, 1, 1], rule("sum")) == [[0, 1], [2], [3, 4], [5]]
    assert published_micro_batches([4, 5, 2, 9, 1, 1], rule("sum", gpus=1, tokens=100)) == [[0, 1, 2, 3, 4, 5]]
    assert published_micro_batches([99, 99], rule("sum", gpus=1)) == [[0], [1]]  # one that never fits is alone
    assert published_micro_batches([1, 1, 1], rule("sum", gpus=8)) == [[0], [1], [2]]
    assert published_micro_batches([], rule("sum")) == []


def test_scales_by_hand():
    counted, lengths = [3, 1, 0, 4], [4, 4, 6, 9]  # two GPUs: micro-batches {0, 1} and {2}, {3}
    assert published_scales(counted, lengths, rule("constant"), 5) == [0.1, 0.1, 0.0, 0.1]
    assert published_scales(counted, lengths, rule("sum"), None) == [1 / 8, 1 / 8, 0.0, 1 / 8]
    assert published_scales(counted, lengths, rule("sequences"), None) == [2 / 12, 2 / 12, 0.0, 1 / 12]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_entropy_of_a_verl_fork_counts_once_a_micro_batch(gpus):
    """Every token costs 1: the sum is the number of micro-batches over the GPUs, the 'n_mb' that printed coefficients hide."""
    lengths = [7, 3, 9, 2, 5, 8, 1, 6]
    for tokens in (6, 12, 100):
        batches = published_micro_batches(lengths, rule("sum", gpus, tokens))
        scales = published_scales(lengths, lengths, rule("sum", gpus, tokens), None)
        total = sum(scale * length for scale, length in zip(scales, lengths, strict=True))
        assert total == pytest.approx(len(batches) / gpus)
        even = published_scales(lengths, lengths, rule("sequences", gpus, tokens), None)
        assert sum(scale * length for scale, length in zip(even, lengths, strict=True)) == pytest.approx(1.0)


def test_a_constant_sum_over_gpus_is_the_fair_one_times_sequences_over_gpus():
    scales = published_scales([5] * 6, [9] * 6, rule("constant", gpus=3), 10)
    assert scales == [pytest.approx(6 / 3 * 1 / (6 * 10))] * 6


# --- whole updates against a loop over the code's micro-batches ---------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


def method_of(name, legacy, rl=RL, **settings):
    table = {"name": name, "rl": rl, **settings}
    config = decode(Config, {"method": table, "legacy": {"name": name, **legacy}})
    check_config(config)
    return make_method(config)


def cut(rows):
    """The rows (prompt and response lengths, anything) of each GPU's micro-batches, as a trainer would loop over them."""
    share = -(-len(rows) // GPUS)
    for start in range(0, len(rows), share):
        batch, held = [], 0
        for row in rows[start : start + share]:
            if batch and held + row[0] > TOKENS:
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += row[0]
        yield batch


def rows_of(groups, *, demonstrations):
    """(length, group, ids, reward or None for a demonstration) in the order of the update: groups, each with its own."""
    rows = []
    for g in groups:
        rows += [
            (len(g.prompt_ids) + len(r.token_ids), g, r.token_ids, reward)
            for r, reward in zip(g.rollouts, g.rewards, strict=True)
        ]
        if demonstrations:
            rows.append((len(g.prompt_ids) + len(g.demonstration_ids), g, g.demonstration_ids, None))
    return rows


def fork(policy, groups, advantages, demonstration_loss, coefficient):
    """Σ over GPUs and their micro-batches of (Σ/L + token mean of the demonstrations − 0.25 token mean of entropy), over GPUs."""
    total = 0.0
    for batch in cut(rows_of(groups, demonstrations=True)):
        pg, shown, entropies = 0.0, [], []
        for _, g, ids, reward in batch:
            logp, entropy = stats(policy, g, ids)
            if reward is None:
                shown.append(demonstration_loss(logp, g))
            else:
                pg = pg + on_policy(logp, advantages(g, reward)).sum()
                entropies.append(entropy)
        total = total + pg / LENGTH
        if shown:
            total = total + coefficient(torch.cat(shown))
        if entropies:
            total = total - 0.25 * torch.cat(entropies).mean()
    return total / GPUS


@pytest.mark.parametrize("name", ["luffy", "rl_with_sft"])
@pytest.mark.parametrize("budget", [40, 10**6])
def test_sums_of_the_verl_forks(policy, name, budget):
    groups = make_groups(policy, [1, 0, 2, 3], 3)

    if name == "luffy":

        def advantages(g, reward):
            return reward - mean([*g.rewards, 1.0])

        def demonstration_loss(logp, g):
            p = logp.exp()
            return -(1.0 - mean([*g.rewards, 1.0])) * p / (p + 0.1)

        def coefficient(values):
            return values.sum() / LENGTH
    else:

        def advantages(g, reward):
            return reward - mean(g.rewards)

        def demonstration_loss(logp, g):
            return -logp

        def coefficient(values):
            return values.mean()

    method = method_of(name, {"reducer": "per_gpu", **SUMS})
    updates = method.updates(method.next_phase(), groups)
    if name == "rl_with_sft":  # its update holds all rollouts and then all demonstrations
        [update] = updates
        assert [s.sampler_logprobs is None for s in update.sequences] == [False] * 12 + [True] * 4
        expected = fork_in_order(policy, update, groups, advantages)
    else:
        expected = fork(policy, groups, advantages, demonstration_loss, coefficient)
    assert_gradient(policy, updates, expected, budget)


def fork_in_order(policy, update, groups, advantages):
    """As `fork`, over the sequences in the order of an update; cross-entropy of demonstrations."""
    by_prompt = {g.prompt_ids: g for g in groups}
    rewards = {(g.prompt_ids, i): reward for g in groups for i, reward in enumerate(g.rewards)}
    rows = [
        (
            len(s.prompt_ids) + len(s.response_ids),
            by_prompt[s.prompt_ids],
            s.response_ids,
            rewards.get((s.prompt_ids, s.rollout)),
        )
        for s in update.sequences
    ]
    total = 0.0
    for batch in cut(rows):
        shown, entropies = [], []
        for _, g, ids, reward in batch:
            logp, entropy = stats(policy, g, ids)
            if reward is None:
                shown.append(-logp)
            else:
                total = total + on_policy(logp, advantages(g, reward)).sum() / LENGTH
                entropies.append(entropy)
        for values, coefficient in ((shown, 1.0), (entropies, -0.25)):
            if values:
                total = total + coefficient * torch.cat(values).mean()
    return total / GPUS


def assert_gradient(policy, updates, expected, budget):
    [update] = updates
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, policy.parameters)])
    found, _ = gradient(policy, update, budget=budget)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-9


@pytest.mark.parametrize("budget", [40, 10**6])
def test_sums_of_trinity(policy, budget):
    """CHORD: (1 − μ) Σ_j B_j/B · token mean + μ the same over demonstrations."""
    groups = make_groups(policy, [1, 0, 2, 3, None, None, None], 4)
    table = {"demonstrations_per_step": 3, "mu_peak": 0.4, "mu_valley": 0.4, "mu_warmup_steps": 0, "mu_decay_steps": 0}
    method = method_of(
        "chord",
        {"reducer": "by_sequences", **SUMS},
        rl=RL | {"entropy_coefficient": 0.0, "normalizer": "token", "constant_tokens": "none"},
        **table,
    )
    updates = method.updates(method.next_phase(), groups)
    [update] = updates
    by_prompt = {g.prompt_ids: g for g in groups}
    rows = [
        (len(s.prompt_ids) + len(s.response_ids), by_prompt[s.prompt_ids], s.response_ids, s.rollout)
        for s in update.sequences
    ]
    total = 0.0
    for batch in cut(rows):
        own, shown = [], []
        for _, g, ids, rollout in batch:
            logp, _ = stats(policy, g, ids)
            if rollout is None:
                shown.append(-logp)
            else:
                own.append(on_policy(logp, g.rewards[rollout] - mean(g.rewards)))
        for values, weight, count in ((own, 0.6, 16), (shown, 0.4, 3)):
            if values:
                total = total + weight * len(values) / count * torch.cat(values).mean()
    assert_gradient(policy, updates, total, budget)


def test_sums_depend_on_the_gpus_of_the_code_and_the_default_does_not_exist(policy):
    """What the switch is for: the same data, another gradient. Without it terms carry no published sum at all."""
    groups = make_groups(policy, [1, 0, 2, 3], 3)
    gradients = []
    for legacy in (
        {"gpus": 2, "micro_batch_tokens": 60},
        {"gpus": 4, "micro_batch_tokens": 60},
        {"gpus": 2, "micro_batch_tokens": 30},
    ):
        method = method_of("luffy", {"reducer": "per_gpu", **legacy})
        [update] = method.updates(method.next_phase(), groups)
        assert all(term.published is not None for term in update.terms)
        gradients.append(gradient(policy, update)[0])
    fair = make_method(decode(Config, {"method": {"name": "luffy", "rl": RL}}))
    [update] = fair.updates(fair.next_phase(), groups)
    assert all(term.published is None for term in update.terms)
    gradients.append(gradient(policy, update)[0])
    for one, other in itertools.combinations(gradients, 2):
        assert float((one - other).norm()) > 1e-3 * float(one.norm())


def test_relift_divides_its_sft_phases_by_gpus(policy):
    groups = make_groups(policy, [0, 0], 4)
    sft = Phase(name="sft", optimizer="sft")
    found = []
    for legacy in ({"reducer": "per_gpu", "sft_over_gpus": True, **SUMS}, {"reducer": "per_gpu", **SUMS}):
        method = method_of("relift", legacy, buffer_size=2)
        method.updates(method.next_phase(), groups)
        assert method.next_phase().name == "sft"  # state and phases are the method's own
        [update] = method.updates(sft, ())
        assert all(term.published is None for term in update.terms)
        found.append(gradient(policy, update)[0])
    assert float((found[0] * GPUS - found[1]).norm()) < 1e-12 * float(found[1].norm())


# --- out of reach -------------------------------------------------------------------------------------------------------

NAMED = {
    "luffy-qwen2.5-math-7b": "luffy", "rl-with-sft-qwen2.5-math-7b": "rl_with_sft", "relift-qwen2.5-math-7b": "relift",
    "hpt-qwen2.5-math-7b": "hpt", "chord-qwen2.5-math-7b": "chord", "chord-mu-qwen2.5-math-7b": "chord",
    "chord-constant-qwen2.5-math-7b": "chord", "psft-qwen2.5-7b-instruct": "psft",
    "prefix-rft-qwen2.5-math-7b": "prefix_rft",
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_only_recipes_that_name_a_code_have_legacy_settings(name):
    _, config = load_config(name)
    assert config.legacy.name == NAMED.get(name, "none")
    assert (in_force(config.legacy) is None) == (name not in NAMED)
    assert ("legacy" in read_recipe(name).tables) == (name in NAMED)
    if name in NAMED:
        text = warning(config.legacy)
        assert f"legacy.name = '{NAMED[name]}'" in text
        assert all(f"{field} = " in text for field in in_force(config.legacy) if field != "name")


def test_the_default_of_every_method_has_none():
    for name in METHODS:
        config = decode(Config, {"method": {"name": name}})
        assert config.legacy == LegacyConfig()
        assert not isinstance(make_method(config), AsPublished)


@pytest.mark.parametrize("flag", ["--legacy.reducer", "--legacy.name=luffy", "--legacy.no-append-end", "--legacy"])
@pytest.mark.parametrize("recipe", ["luffy-smollm2", "luffy-qwen2.5-math-7b"])
def test_it_is_no_flag(recipe, flag):
    with pytest.raises(ConfigError, match="--legacy is not a flag"):
        load_config(recipe, [flag, "per_gpu"])


def tables(method="luffy", **legacy):
    return {"method": {"name": method} if method == "sft" else {"name": method, "rl": RL}, "legacy": legacy}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (tables(reducer="per_gpu", **SUMS), "legacy.reducer, legacy.gpus, legacy.micro_batch_tokens without legacy.name"),
        (tables(append_end=False), "legacy.append_end without legacy.name"),
        (tables("hpt", name="luffy", reducer="per_gpu", **SUMS), "legacy.name = 'luffy' with method.name = 'hpt'"),
        (tables("grpo", name="luffy", require_thought_end=True), "with method.name = 'grpo'"),
        (tables("sft", name="psft", append_end=False), "with method.name = 'sft' and method.sft.loss = 'cross_entropy'"),
        (tables("mifo", name="relift", sft_over_gpus=True, gpus=8), "with method.name = 'mifo'"),
        (tables(name="luffy"), "alone changes nothing"),
        (tables(name="luffy", skip_above_norm=80.0), "legacy.skip_above_norm = 80.0 is nothing that the code of 'luffy' does"),
        (tables(name="luffy", append_end=False), "legacy.append_end = False is nothing"),
        (tables("hpt", name="hpt", require_thought_end=True), "legacy.require_thought_end = True is nothing"),
        (tables(name="luffy", reducer="by_sequences", **SUMS), "is not what the code of 'luffy' does. Use 'per_gpu'"),
        (tables("chord", name="chord", reducer="per_gpu", **SUMS), "Use 'by_sequences'"),
        (tables(name="luffy", reducer="per_gpu", gpus=8), "needs legacy.gpus and legacy.micro_batch_tokens"),
        (tables(name="luffy", require_thought_end=True, **SUMS), "have no effect with legacy.reducer = 'update'"),
        (tables("relift", name="relift", sft_over_gpus=True), "needs legacy.gpus"),
        (tables("hpt", name="hpt", reducer="per_gpu", **SUMS), "method.denominator = 'batch' with legacy.name = 'hpt'"),
        (
            {"method": {"name": "luffy"}, "legacy": {"name": "luffy", "reducer": "per_gpu", **SUMS}},
            "method.rl.normalizer = 'token'",
        ),
        (
            tables("prefix_rft", name="prefix_rft", prefix_ranking="within_micro_batches", gpus=8),
            "legacy.prefix_ranking = 'within_micro_batches' needs legacy.gpus and legacy.micro_batch_tokens",
        ),
        (tables("prefix_rft", name="prefix_rft", **SUMS), "have no effect with legacy.reducer = 'update'"),
        (tables(name="luffy", prefix_ranking="within_micro_batches", **SUMS), "is nothing that the code of 'luffy' does"),
        (tables(name="somebody"), "legacy.name = 'somebody' is not one of"),
        (tables(name="luffy", reducer="mean_of_means", **SUMS), "'mean_of_means' is not one of"),
    ],
)  # fmt: skip
def test_what_is_refused(settings, words):
    with pytest.raises(ConfigError) as caught:
        check_config(decode(Config, settings))
    assert words in str(caught.value)


def test_a_file_that_extends_a_recipe_can_leave_its_legacy_out(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "luffy-qwen2.5-math-7b"\n[legacy]\nname = "none"\n')
    _, config = load_config(str(path))
    assert config.legacy == LegacyConfig()
    assert config.method == load_config("luffy-qwen2.5-math-7b")[1].method


def test_it_goes_through_the_saved_configuration():
    _, config = load_config("relift-qwen2.5-math-7b")
    assert decode(Config, encode(config)) == config
    assert dataclasses.replace(config.legacy, name="none") != LegacyConfig()
