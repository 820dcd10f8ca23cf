"""Each method in a whole run on a scripted engine: which questions are sampled how often, when it switches, what enters every
update, and what it is divided by.

Questions are numbered in the order of the stream. Of four rollouts of question k the first 0, 4, 1, 2 are right, for k = 0, 1,
2, 3 and so on, so questions 0 and 1 of four say nothing to a group baseline. The i-th rollout has 2 + i tokens: 14 a group of
four, 9 a group of three. What is expected is written out for each method; `d` are the lengths of demonstrations.
"""

from collections.abc import Iterable

import pytest
from conftest_e2e import run_small

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.data.stream import ProblemStream
from mifo.train.rows import counted_tokens
from mifo.types import Rollout, Verdict

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.0}
RIGHT = (0, 4, 1, 2)


class Script:
    """Stands in for engine and grader of a run, and writes down what they and the learners are asked to do."""

    def __init__(self, run):
        self.run, self.events, self.version = run, [], 0
        corpus = run.parts.corpus
        order = [p.id for p in ProblemStream(corpus.train, run.config.train.seed).take(len(corpus.train))]
        self.number = {name: k for k, name in enumerate(order)}
        self.prompts = {corpus.encoded[name].prompt_ids: name for name in order}
        self.d = [len(corpus.encoded[name].demonstration_ids) for name in order]
        tokenizer = run.parts.chat.tokenizer
        self.filler, self.plus, self.minus = (
            tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in ("x", "+", "-")
        )
        run.engine = self
        run.parts.grader.grade = self.grade
        optimizers = {id(o): name for name, o in run.parts.optimizers.items()}
        self.listen(run.learner, optimizers)
        if run.parts.scorer is not None:
            self.listen(run.parts.scorer.learner, {id(run.parts.scorer.optimizer): run.parts.scorer.name})

    def update(self, model, version):
        self.version = version

    def generate(self, prompts, n, sampling, seed):
        asked, rows = [], []
        for prompt in prompts:
            length = max(size for size in range(len(prompt) + 1) if prompt[:size] in self.prompts)
            k, prefix = self.number[self.prompts[prompt[:length]]], len(prompt) - length
            asked.append((k, prefix))
            right = 2 if prefix and n == 4 else RIGHT[k % 4]
            rows.append(tuple(self.rollout(i, i < right) for i in range(n)))
        self.events.append(("ask", [k for k, _ in asked], n, [prefix for _, prefix in asked]))
        return rows

    def rollout(self, i, right):
        ids = (self.filler,) * (1 + i) + ((self.plus if right else self.minus),)
        return Rollout(token_ids=ids, logprobs=(-1.0,) * len(ids), stop="stop", weight_version=self.version)

    def grade(self, answers):
        return [Verdict.CORRECT if answer.text.endswith("+") else Verdict.WRONG for answer in answers]

    def listen(self, learner, optimizers):
        inner = learner.apply

        def apply(update, optimizer, **options):
            self.events.append((optimizers[id(optimizer)], self.described(update)))
            return inner(update, optimizer, **options)

        learner.apply = apply

    def described(self, update):
        """{stream: (questions whose rollouts, and whose demonstrations, have a weight; tokens that are counted)}."""
        found = {}
        for term in update.terms:
            heard = [s for s in update.sequences if any(_weights(s.weights.get(term.name, 0.0)))]
            rollouts = sorted(
                {self.number[s.problem_id] for s in heard if s.sampler_logprobs is not None or s.rollout is not None}
            )
            shown = sorted(
                {self.number[s.problem_id] for s in heard if s.sampler_logprobs is None and s.rollout is None}
            )
            found[term.name] = (rollouts, shown, sum(counted_tokens(term, s) for s in update.sequences))
        return found


def _weights(weight):
    return weight if isinstance(weight, tuple) else (weight,)


def flow(method, tmp_path, *, steps=2, **tables):
    """(events, lengths of demonstrations) of a run."""
    plain = {
        "model": {"path": "tiny", "compute": "float32"},
        "data": {"families": ["tiny"], "train_problems": 30, "evaluation": "none"},
        "rollout": {"max_response_tokens": 30},
        "method": method,
        "train": {"steps": steps, "threads": 1},
        "run": {"checkpoint_steps": "none", "export": False, "samples_per_step": 0},
    }
    config = decode(Config, {**plain, **tables})
    check_config(config)
    made = []
    run_small(config, tmp_path / "run", before=lambda run: made.append(Script(run)))
    return made[0].events, made[0].d


def ask(*questions, n=4, prefixes=None):
    return ("ask", list(questions), n, prefixes or [0] * len(questions))


def rl(first, second, *, size=14):
    """The two RL updates of a step on questions first..., of which the third and fourth say something."""
    return [("rl", {"pg": ([], [], 2 * size)}), ("rl", {"pg": ([first, second], [], 2 * size)})]


def step(start):
    """An RL step on four questions."""
    return [ask(*range(start, start + 4)), *rl(start + 2, start + 3)]


def sft(d, questions: Iterable[int]):
    questions = list(questions)
    return ("sft", {"ce": ([], questions, sum(d[k] for k in questions))})


def test_grpo(tmp_path):
    events, _ = flow({"name": "grpo", "rl": RL}, tmp_path)
    assert events == [*step(0), *step(4)]


def test_dynamic_sampling_learns_from_the_mixed_groups_alone(tmp_path):
    dynamic = RL | {"prompts_per_step": 4, "dynamic_sampling": True, "dynamic_prompts": 4}
    events, _ = flow({"name": "grpo", "rl": dynamic}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ask(4, 5, 6, 7),
        ("rl", {"pg": ([2, 3], [], 28)}),
        ("rl", {"pg": ([6, 7], [], 28)}),
    ]


def test_sft(tmp_path):
    events, d = flow({"name": "sft", "batch_size": 4}, tmp_path)
    assert events == [sft(d, range(4)), sft(d, range(4, 8))]


def test_sft_rl_switches_once(tmp_path):
    events, d = flow({"name": "sft_rl", "rl": RL, "sft_steps": 1, "sft_batch_size": 4}, tmp_path, steps=3)
    assert events == [sft(d, range(4)), *step(4), *step(8)]


def test_rl_sft_switches_once(tmp_path):
    events, d = flow({"name": "rl_sft", "rl": RL, "rl_steps": 1, "sft_batch_size": 4}, tmp_path, steps=3)
    assert events == [*step(0), sft(d, range(4, 8)), sft(d, range(8, 12))]


def test_multi_stage_takes_turns(tmp_path):
    method = {"name": "multi_stage", "rl": RL, "sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4}
    events, d = flow(method, tmp_path, steps=4)
    assert events == [sft(d, range(4)), *step(4), sft(d, range(8, 12)), *step(12)]


def test_mifo_learns_its_buffer_when_it_is_full_in_batches(tmp_path):
    """Accuracies 0 and 1/4 are at most p: two questions a step. Four wait after the second step, and are learned two by two."""
    method = {"name": "mifo", "rl": RL, "accuracy_threshold": 0.25, "buffer_size": 4, "sft_batch_size": 2}
    events, d = flow(method, tmp_path, steps=3)
    assert events == [*step(0), *step(4), sft(d, [0, 2]), sft(d, [4, 6]), *step(8)]


def test_relift_learns_once_a_full_buffer_of_what_failed(tmp_path):
    events, d = flow({"name": "relift", "rl": RL, "buffer_size": 2}, tmp_path, steps=3)
    assert events == [*step(0), *step(4), sft(d, [0, 4]), *step(8)]


def test_luffy_puts_a_demonstration_into_each_group(tmp_path):
    """The demonstration has a reward of 1: a question without a right rollout says something, one with three of three nothing."""
    events, d = flow({"name": "luffy", "rl": RL}, tmp_path, steps=1)
    both = [9 + 9 + d[0] + d[1], 9 + 9 + d[2] + d[3]]
    assert events == [
        ask(0, 1, 2, 3, n=3),
        ("rl", {"pg": ([0], [], both[0]), "off": ([], [0], both[0])}),
        ("rl", {"pg": ([2, 3], [], both[1]), "off": ([], [2, 3], both[1])}),
    ]


def test_rl_with_sft_has_a_denominator_for_each(tmp_path):
    events, d = flow({"name": "rl_with_sft", "rl": RL}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3, n=3),
        ("rl", {"pg": ([], [], 18), "ce": ([], [0, 1], d[0] + d[1])}),
        ("rl", {"pg": ([2, 3], [], 18), "ce": ([], [2, 3], d[2] + d[3])}),
    ]


def test_srft_has_four_streams(tmp_path):
    method = {"name": "srft", "prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2}
    events, d = flow(method, tmp_path, steps=1)
    first, second = d[0] + d[1], d[2] + d[3]
    assert events == [
        ask(0, 1, 2, 3),
        ("rl", {"sft": ([], [0, 1], first), "off": ([], [0], first), "pos": ([1], [], 28), "neg": ([0], [], 28)}),
        (
            "rl",
            {
                "sft": ([], [2, 3], second),
                "off": ([], [2, 3], second),
                "pos": ([2, 3], [], 28),
                "neg": ([2, 3], [], 28),
            },
        ),
    ]


@pytest.mark.parametrize(
    ("method", "taught"),
    [({"name": "hpt"}, [0]), ({"name": "superrl"}, [0]), ({"name": "superrl", "gate": "advantage"}, [0, 1])],
)
def test_gates_choose_question_by_question(tmp_path, method, taught):
    """Both denominators are those of all questions of an update, whichever side they are on."""
    events, d = flow({**method, "rl": RL}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ("rl", {"pg": ([], [], 28), "ce": ([], taught, d[0] + d[1])}),
        ("rl", {"pg": ([2, 3], [], 28), "ce": ([], [], d[2] + d[3])}),
    ]


def test_superrl_by_sigma_learns_both_of_every_question(tmp_path):
    events, d = flow({"name": "superrl", "gate": "log_sigma", "rl": RL}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ("rl", {"pg": ([], [], 28), "ce": ([], [0, 1], d[0] + d[1])}),
        ("rl", {"pg": ([2, 3], [], 28), "ce": ([], [2, 3], d[2] + d[3])}),
    ]


def test_chord_shows_questions_that_it_does_not_sample(tmp_path):
    """Step 2 begins with question 6: there it is the first two of four that say something."""
    mu = {"mu_peak": 0.5, "mu_valley": 0.5, "mu_warmup_steps": 0, "mu_decay_steps": 0}
    events, d = flow({"name": "chord", "rl": RL, "demonstrations_per_step": 2, **mu}, tmp_path)
    assert events == [
        ask(0, 1, 2, 3),
        ("rl", {"pg": ([], [], 28), "ce": ([], [4], d[4])}),
        ("rl", {"pg": ([2, 3], [], 28), "ce": ([], [5], d[5])}),
        ask(6, 7, 8, 9),
        ("rl", {"pg": ([6, 7], [], 28), "ce": ([], [10], d[10])}),
        ("rl", {"pg": ([], [], 28), "ce": ([], [11], d[11])}),
    ]


def test_uft_continues_a_hint_and_imitates_it(tmp_path):
    """One chunk in the first of two stages: all four read the demonstration without its end token; none in the second."""
    method = {"name": "uft", "rl": RL, "hints": "stage", "hint_chunks": 1, "hint_steps": 4}
    events, d = flow(method, tmp_path)
    hints = [length - 1 for length in d[:4]]
    assert events == [
        ask(0, 1, 2, 3, prefixes=hints),
        ("rl", {"pg": ([0, 1], [], 28), "ce": ([], [0, 1], hints[0] + hints[1])}),
        ("rl", {"pg": ([2, 3], [], 28), "ce": ([], [2, 3], hints[2] + hints[3])}),
        *step(4),
    ]


def test_prefix_rft_has_one_hybrid_of_four(tmp_path):
    """Three plain rollouts, and one that continues 95 % of the demonstration: both parts are in the group, and count."""
    method = {"name": "prefix_rft", "rl": RL, "prefix_token_fraction": 1.0}
    events, d = flow(method, tmp_path, steps=1)
    prefixes = [int(0.95 * length + 1e-9) for length in d[:4]]
    plain, hybrid, *updates = events
    assert plain == ask(0, 1, 2, 3, n=3)
    assert hybrid == ask(0, 1, 2, 3, n=1, prefixes=prefixes)
    assert updates == [
        ("rl", {"pg": ([], [], 2 * (9 + 2) + prefixes[0] + prefixes[1])}),
        ("rl", {"pg": ([2, 3], [], 2 * (9 + 2) + prefixes[2] + prefixes[3])}),
    ]


def test_bread_samples_what_failed_again_from_inside_its_demonstration(tmp_path):
    """Question 0 failed: behind half of its demonstration two of four are right, and that group takes its place."""
    events, d = flow({"name": "bread", "rl": RL, "episodes": 2, "success_high": 1.0}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ask(0, prefixes=[round((d[0] - 1) / 2)]),
        ("rl", {"pg": ([0], [], 28)}),
        ("rl", {"pg": ([2, 3], [], 28)}),
    ]


def test_sasr_warms_up_by_sft_and_then_takes_either_whole(tmp_path):
    events, d = flow({"name": "sasr", "rl": RL, "warmup_steps": 2, "sft_batch_size": 4}, tmp_path, steps=7)
    assert events[:2] == [sft(d, range(4)), sft(d, range(4, 8))]
    rest, drawn, kinds = events[2:], 8, set()
    while rest:
        expected = [sft(d, range(drawn, drawn + 4))] if rest[0][0] == "sft" else step(drawn)
        assert rest[: len(expected)] == expected
        kinds.add(rest[0][0])
        rest, drawn = rest[len(expected) :], drawn + 4
    assert (drawn, kinds) == (28, {"sft", "ask"})


def test_ppo_teaches_its_critic_first_and_hears_every_rollout(tmp_path):
    """Values are 0 at first: an all-right and an all-wrong group differ from the whitened mean, so all have a weight."""
    events, _ = flow({"name": "ppo", "rl": RL, "critic_updates_per_step": 2}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ("critic", {"value": ([0, 1], [], 28)}),
        ("critic", {"value": ([2, 3], [], 28)}),
        ("rl", {"pg": ([0, 1], [], 28)}),
        ("rl", {"pg": ([2, 3], [], 28)}),
    ]


def test_prime_leaves_out_what_is_too_hard_or_too_easy(tmp_path):
    """Accuracies 1/4 and 1/2 are within [0.2, 0.8], 0 and 1 are not, for the policy and the reward model alike."""
    events, _ = flow({"name": "prime", "rl": RL}, tmp_path, steps=1)
    assert events == [
        ask(0, 1, 2, 3),
        ("prm", {"prm": ([2, 3], [], 28)}),
        ("rl", {"pg": ([2], [], 14)}),
        ("rl", {"pg": ([3], [], 14)}),
    ]


def test_mifo_with_ppo_collects_failures_and_teaches_its_critic_in_rl_alone(tmp_path):
    method = {"name": "mifo", "rl": RL, "buffer_size": 1, "accuracy_threshold": 0.0}
    method["scorer"] = {"name": "ppo", "critic_updates_per_step": 1}
    events, d = flow(method, tmp_path)
    kinds = [kind for kind, *_ in events]
    assert kinds == ["ask", "critic", "rl", "rl", "sft"] * 2
    assert [event for event in events if event[0] == "sft"] == [sft(d, [0]), sft(d, [4])]
