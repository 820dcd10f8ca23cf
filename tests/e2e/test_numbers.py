"""Numbers that stay finite, in whole runs: what is injected is skipped, recorded by name, and resumed in the same bits."""

from dataclasses import replace

import pytest
import torch
from conftest_e2e import cut_back, journal, run_small, small_config
from test_resume import assert_same, digest

from mifo.errors import CheckpointError, NumericsError
from mifo.train.checkpoint import list_checkpoints, load_checkpoint

FEW = {"train": {"steps": 4}}


def events(folder, kind):
    return [record for record in journal(folder, "events") if record["event"] == kind]


def taint_rewards(run, *, steps, value=float("nan")):
    """The second rollout of the first problem of these steps has a reward that is not finite."""
    plain = run.make_group

    def group(problem, rollouts, verdicts):
        made = plain(problem, rollouts, verdicts)
        if run.steps in steps and problem is run.first and made.rewards:
            made = replace(made, rewards=(made.rewards[0], value, *made.rewards[2:]))
        return made

    def take(count, plain=run.stream.take):
        problems = plain(count)
        run.first = problems[0] if problems else run.first
        return problems

    run.make_group, run.stream.take = group, take


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_reward_skips_its_step_and_names_its_problem(tmp_path, value):
    config = small_config(**FEW)
    run = run_small(config, tmp_path / "run", before=lambda run: taint_rewards(run, steps={1}, value=value))
    [fault] = events(tmp_path / "run", "fault")
    assert fault["reason"] == "1 rewards are not finite"
    [sample] = fault["samples"]
    assert (sample["rollout"], sample["what"]) == (1, "reward")
    assert sample["problem"] in run.parts.corpus.encoded
    by_step = {r["step"]: r for r in journal(tmp_path / "run", "metrics") if r["phase"] == "rl"}
    assert by_step[2]["updates"] == []
    assert by_step[2]["accuracy"] is not None  # the rollouts themselves are recorded as ever
    assert [len(by_step[i]["updates"]) for i in (1, 3, 4)] == [2, 2, 2]
    assert run.version == run.ledger.updates
    first, second = list_checkpoints(tmp_path / "run" / "checkpoints")[:2]
    before, weights = (load_checkpoint(path).tensors["model"] for path in (first, second))
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_the_buffer_fills_whether_a_step_is_skipped_or_not(tmp_path):
    """Which questions the model fails is a matter of verdicts: a skipped RL step still brings its hard questions."""
    config = small_config(train={"steps": 1})
    plain = run_small(config, tmp_path / "plain")
    tainted = run_small(config, tmp_path / "tainted", before=lambda run: taint_rewards(run, steps={0}))
    assert tainted.version < plain.version
    assert plain.method.state_dict() == tainted.method.state_dict()
    assert len(plain.method.buffer) > 0


def test_so_many_in_a_row_abort_and_the_checkpoint_before_stays(tmp_path):
    config = small_config(**FEW, guard={"skips_in_a_row": 2})
    with pytest.raises(NumericsError, match="2 updates of phase 'rl' in a row"):
        run_small(config, tmp_path / "run", before=lambda run: taint_rewards(run, steps={1, 2, 3}))
    assert len(events(tmp_path / "run", "fault")) == 2  # both are on disk although the run is over
    resumed = run_small(config, tmp_path / "run", resume=True)  # without the taint it goes on
    assert resumed.steps == 4


def poison_step(run, *, steps):
    """NaN log-probs for the first rollout of the RL updates of these steps, in the trainer alone."""
    plain = run.learner._forward

    def forward(update, batch, origin):
        stats = plain(update, batch, origin)
        sampled = [i for i in origin if update.sequences[i].sampler_logprobs is not None]
        if run.steps in steps and sampled and 0 in origin:
            hit = torch.zeros_like(stats.logp_T, dtype=torch.bool)
            hit[stats.sequence_T == list(origin).index(0)] = True
            stats = replace(stats, logp_T=stats.logp_T.masked_fill(hit, float("nan")))
        return stats

    run.learner._forward = forward


def test_skips_are_resumed_in_the_same_bits_counter_included(tmp_path):
    """Updates of steps 1 and 3 are skipped; killed after every step and resumed, the end is the same, and so is the count."""
    config = small_config(**FEW, guard={"skips_in_a_row": 4})

    def poison(run):
        poison_step(run, steps={1, 3})

    whole = run_small(config, tmp_path / "whole", before=poison)
    faults = events(tmp_path / "whole", "fault")
    assert len(faults) == 4  # two updates in each of two steps
    assert whole.guard.in_a_row["rl"] == 2
    assert {f["samples"][0]["what"] for f in faults} == {"log-prob"}
    assert all(f["samples"][0]["rollout"] is not None for f in faults)
    for iteration in range(1, whole.iterations):
        cut_back(tmp_path / "whole", tmp_path / f"cut-{iteration}", iteration)
        resumed = run_small(config, tmp_path / f"cut-{iteration}", resume=True, before=poison)
        assert_same(whole, resumed)
        assert events(tmp_path / f"cut-{iteration}", "fault") == faults
    strict = small_config(**FEW, guard={"skips_in_a_row": 2})
    with pytest.raises(NumericsError, match="in a row"):
        run_small(strict, tmp_path / "strict", before=poison)


def test_rollbacks_are_resumed_in_the_same_bits(tmp_path):
    """A spike in step 7 undoes the update before it, also if the run was killed in between: the copy is in the checkpoint."""
    config = small_config(
        train={"steps": 7},
        method={"buffer_size": 30, "sft_batch_size": 30, "freeze_top": 0.0},
        guard={"on_spike": "rollback", "spike_factor": 50.0},
    )

    def spike(run):
        plain = run.method.updates

        def updates(phase, groups):
            made = plain(phase, groups)
            if run.steps != 6:
                return made
            loud = [replace(s, weights={k: 1e4 * w for k, w in s.weights.items()}) for s in made[0].sequences]
            return [replace(made[0], sequences=tuple(loud)), *made[1:]]

        run.method.updates = updates

    whole = run_small(config, tmp_path / "whole", before=spike)
    [fault] = events(tmp_path / "whole", "fault")
    assert (fault["fault"], fault["action"]) == ("spike", "rollback")
    assert whole.version == 14  # 13 steps, and one of them undone, which makes the weights others once more
    assert whole.ledger.updates == 13
    assert whole.parts.optimizers["rl"].updates == 12
    for iteration in (5, 6):
        cut_back(tmp_path / "whole", tmp_path / f"cut-{iteration}", iteration)
        assert_same(whole, run_small(config, tmp_path / f"cut-{iteration}", resume=True, before=spike))

    def forget(run):
        spike(run)
        run.guard.good.forget()

    cut_back(tmp_path / "whole", tmp_path / "forgetful", 6)
    other = run_small(config, tmp_path / "forgetful", resume=True, before=forget)
    assert digest(other)[0] != digest(whole)[0]  # and the comparison notices where it is not


def test_rollouts_that_are_not_finite_skip_the_step_and_are_named(tmp_path):
    def break_sampler(run):
        plain = run.engine.generate

        def generate(*arguments):
            if run.steps == 2 and arguments[1] == 4:  # not in an evaluation
                raise NumericsError("log-probs of 1 of 16 rollouts are not finite", [(3, 2)])
            return plain(*arguments)

        run.engine.generate = generate

    run = run_small(small_config(**FEW), tmp_path / "run", before=break_sampler)
    assert run.steps == 4
    [fault] = events(tmp_path / "run", "fault")
    assert (fault["samples"][0]["rollout"], fault["samples"][0]["what"]) == (2, "rollout log-prob")
    assert fault["samples"][0]["problem"] in run.parts.corpus.encoded
    [skipped] = [r for r in journal(tmp_path / "run", "metrics") if r["phase"] == "rl" and "accuracy" not in r]
    assert skipped["updates"] == []


def test_bad_weights_stop_the_run_and_never_reach_a_checkpoint(tmp_path):
    def break_weights(run):
        plain = run.record

        def record(*arguments):
            plain(*arguments)
            if run.iterations == 2:
                with torch.no_grad():
                    run.learner.parameters[4].view(-1)[0] = float("inf")

        run.record = record

    with pytest.raises(NumericsError, match=r"a checkpoint would hold .* infinite: model\.layers"):
        run_small(small_config(**FEW), tmp_path / "run", before=break_weights)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000001"]
    every_other = small_config(**FEW, run={"checkpoint_steps": 100})
    with pytest.raises(NumericsError, match=r"weights that are NaN or infinite: model\.layers"):
        run_small(every_other, tmp_path / "late", before=break_weights)  # found by the next rollouts or update


@pytest.mark.parametrize("part", ["model", "rl"])
def test_bad_numbers_in_a_checkpoint_are_named_when_it_is_read(finished, tmp_path, part):
    from safetensors.torch import load_file, save_file

    cut_back(finished[0], tmp_path / "cut", 3)
    file = tmp_path / "cut" / "checkpoints" / "step-000003" / f"{part}.safetensors"
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.ndim == 2)
    tensors[name][1, 1] = float("nan")
    save_file(tensors, file)
    with pytest.raises((NumericsError, CheckpointError), match=r"model\.|safetensors"):
        run_small(small_config(), tmp_path / "cut", resume=True)


def test_memory_that_runs_out_is_reported_and_stays_halved_through_a_resume(tmp_path):
    config = small_config(train={"steps": 4, "micro_batch_tokens": 400})

    def small_memory(run):
        plain = run.learner.policy.token_stats

        def token_stats(batch):
            if batch.tokens > 60:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return plain(batch)

        run.learner.policy.token_stats = token_stats

    run = run_small(config, tmp_path / "run", before=small_memory)
    found = events(tmp_path / "run", "memory")
    assert found[0]["before"] == 400
    assert found[-1]["micro_batch_tokens"] == run.learner.micro_batch_tokens <= 60
    updates = [u for r in journal(tmp_path / "run", "metrics") for u in r["updates"]]
    assert updates[-1]["micro_batch_tokens"] == run.learner.micro_batch_tokens
    cut_back(tmp_path / "run", tmp_path / "cut", 2)
    resumed = run_small(config, tmp_path / "cut", resume=True)  # with memory enough: it must not matter
    assert_same(run, resumed)


def alarms(folder):
    return [record for record in events(folder, "alarm") if record["alarm"] == "sampler_gap"]


def noisy_sampler(run, share=0.01):
    """The engine's copy of the weights is off by 1 % of each weight, every time it is refreshed."""
    from mifo.train.model import tiny_model

    plain, copy = run.engine.update, tiny_model()

    def update(model, version):
        copy.load_state_dict(model.state_dict())
        draw = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.mul_(1 + share * torch.randn(parameter.shape, generator=draw))
        plain(copy, version)

    run.engine.update = update
    run.engine.version = -1


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainer", ["float32", "bfloat16"])
def test_one_percent_of_noise_in_the_sampler_s_weights_trips_the_alarm(tmp_path, trainer, compute):
    """In every step, and in none without the noise; with entropy bonus off, most steps feed little or nothing."""
    config = small_config(
        train={"steps": 4},
        model={"compute": trainer},
        rollout={"compute": compute},
        method={"rl": {"entropy_coefficient": 0.0}, "buffer_size": 30, "sft_batch_size": 30},
        data={"evaluation": "none"},
    )
    run_small(config, tmp_path / "quiet")
    assert alarms(tmp_path / "quiet") == []
    run_small(config, tmp_path / "noisy", before=noisy_sampler)
    metrics = journal(tmp_path / "noisy", "metrics")
    assert any(r["updates"][0]["trained_sequences"] == 0 for r in metrics)
    assert [a["step"] for a in alarms(tmp_path / "noisy")] == [1, 2, 3, 4]
    assert "importance_cap" in alarms(tmp_path / "noisy")[0]["advice"]


def test_the_remedy_weighs_what_a_noisy_sampler_drew(tmp_path):
    """Importance weights leave an honest run alone but for rounding, and change the gradient of a noisy one."""

    def trained(name, cap, *, noisy):
        def prepare(run):
            plain = run.make_group
            run.make_group = lambda *arguments: with_mixed_rewards(plain(*arguments))
            if noisy:
                noisy_sampler(run, share=0.1)

        config = small_config(train={"steps": 1}, method={"rl": {"importance_cap": cap, "updates_per_step": 1}})
        run_small(config, tmp_path / name, before=prepare)
        return journal(tmp_path / name, "metrics")[0]["updates"][0]

    plain, capped = trained("plain", "none", noisy=False), trained("capped", 2.0, noisy=False)
    assert capped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    noisy, mended = trained("noisy", "none", noisy=True), trained("mended", 2.0, noisy=True)
    assert noisy["sampler_gap"] == mended["sampler_gap"] > 0.01
    assert abs(mended["grad_norm"] / noisy["grad_norm"] - 1) > 1e-3


def with_mixed_rewards(group):
    return replace(group, rewards=tuple(float(i == 0) for i in range(len(group.rewards))))
