"""The frozen data that flows through a run (DESIGN 3).

    Problem -> Group (rollouts and their verdicts) -> method -> Update (sequences, terms) -> engine

Lengths travel with the ids: a response is exactly `response_ids`, the end-of-sequence id included when the model (or
the demonstration) produced it. Nothing downstream guesses a mask from pad or end ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = tuple[int, ...]
Weight: TypeAlias = "float | tuple[float, ...]"  # of a sequence in a stream; a tuple weighs each response token
StopReason = Literal["stop", "length"]  # a stop id was sampled | the response reached its maximum length
GraderName = Literal["math", "exact", "choice", "code", "label"]
SpanName = Literal[
    "response", "prefix", "continuation"
]  # all of a response | a demonstration's first tokens | the rest
NormalizerName = Literal["token", "sequence", "constant"]  # over all tokens, each sequence by its own, by a constant
ScorerName = Literal["critic", "prm"]  # a value model | an implicit process reward model


class Verdict(str, Enum):
    """What a grader says. Error and timeout are counted and shown; they are never silently 'wrong'."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"
    TIMEOUT = "timeout"


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One verifiable problem.

    `messages` are the turns before the answer (no system turn unless the data brought one). `demonstration` is a
    solution text whose final answer was verified when the data was read, or None. `source` names the family or data set
    the problem is reported under.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    demonstration: str | None = None
    source: str = ""
    grader: GraderName = "math"


class EndsText(Protocol):
    """Says of the sampled tokens of a response whether it ends with the last; only one of `last_ids` can end it."""

    last_ids: TokenIds

    def __call__(self, token_ids: SequenceOf[int]) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy. `logprobs` of a rollout are under this distribution.

    A response ends with the first of `stop_ids`, or where `ends_text` says so.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_ids: TokenIds = ()
    ends_text: EndsText | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response: the first `prefix_tokens` are those of a demonstration, the others were sampled.

    `logprobs[t]` is log π(token_ids[p + t] | prompt, token_ids[:p + t]) under the sampling policy, p the length of the prefix.
    """

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    stop: StopReason
    weight_version: int
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one problem with their verdicts and rewards, in the same order.

    `scores` holds a number for each token of each rollout, from a second model: the value before the token (critic), or its
    implicit reward (process reward model). None where the phase has no such model, or it has not scored them yet.
    """

    problem: Problem
    prompt_ids: TokenIds
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]
    rewards: tuple[float, ...]
    demonstration_ids: TokenIds | None = None
    scores: tuple[tuple[float, ...], ...] | None = None

    @property
    def accuracy(self) -> float:
        """Share of the rollouts with the verdict correct: acc(q) of the paper, whatever the reward scale."""
        return sum(v is Verdict.CORRECT for v in self.verdicts) / len(self.verdicts)

    @property
    def mixed(self) -> bool:
        """Some rollouts are correct and some are not: the group says which of two responses is better."""
        return len({v is Verdict.CORRECT for v in self.verdicts}) == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A verified solution of one problem, ready for training: (q, D(q)) of Algorithm 1."""

    problem_id: str
    prompt_ids: TokenIds
    response_ids: TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One prompt and response that enters an update.

    `weights[name]` is the static weight of this sequence in the term of that name (an advantage, 1.0 for imitation), or one
    weight for each response token. A term that is absent does not see the sequence at all; a weight of 0.0 takes part in the
    term's denominator and adds nothing to its numerator. `sampler_logprobs` are those of the rollout engine, None for
    demonstrations. The first `prefix_tokens` of the response are a demonstration's, and `sampler_logprobs` those of the tokens
    after them. `hint_tokens` are the last tokens of the prompt that are a demonstration's: read, never learned. `target` is what
    a term that regresses should find: for all tokens alike, or for each (returns, a label).
    """

    problem_id: str
    prompt_ids: TokenIds
    response_ids: TokenIds
    weights: Mapping[str, Weight]
    sampler_logprobs: tuple[float, ...] | None = None
    weight_version: int | None = None
    rollout: int | None = None  # which rollout of its problem, as messages name it; None for demonstrations
    prefix_tokens: int = 0
    hint_tokens: int = 0
    target: Weight | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """What a loss may look at, one row per response token of a micro-batch (T rows).

    `logp_T` and `entropy_T` carry gradients (entropy only where a term asks for it). `old_logp_T` is π_old, `ref_logp_T`
    the reference, `sampler_logp_T` those of the rollout engine, `vocabulary_T` the values of the term's `vocabulary`, `target_T`
    the targets of the sequences; each is None when no term needs it. `sequence_T` numbers the sequence that a row belongs to. Of
    a critic, `logp_T` holds its values and `old_logp_T` those at the start of the turn.
    """

    logp_T: Tensor
    entropy_T: Tensor
    weight_T: Tensor
    sequence_T: Tensor
    old_logp_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    sampler_logp_T: Tensor | None = None
    vocabulary_T: Tensor | None = None
    target_T: Tensor | None = None


TokenLoss = Callable[[TokenStats], "Tensor"]  # per-token values [T]; never a mean, never a sum


class VocabularyStatistic(Protocol):
    """A number of each token's whole distribution: from the logits of a chunk of rows (C rows, V words), see `core.vocabulary`.

    `needs_reference` says whether it looks at the reference's logits, `has_gradient` whether `slope` is ever asked for.
    """

    needs_reference: ClassVar[bool]
    has_gradient: ClassVar[bool]

    def value(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """The number of each row, [C]."""
        ...

    def slope(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """Its derivative by the logits, [C, V]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TopEntropy:
    """Keep the ⌈fraction·length⌉ highest-entropy tokens of each response (S0 §3.1), ties by position."""

    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedBatches:
    """Legacy: the micro-batches of a published code, cut here and not by memory.

    The sequences of an update are shared among `gpus`, in order, and each fills micro-batches of at most `tokens` prompt and
    response tokens.
    """

    gpus: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopPrefixEntropy:
    """Of the prefix tokens of a whole update, give weight 0 to all but the ⌈fraction·count⌉ of highest entropy.

    What follows a prefix keeps its weight, and every token still counts in the denominator. `within` ranks in each micro-batch
    of a published code by itself.
    """

    fraction: float
    within: PublishedBatches | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSum(PublishedBatches):
    """Legacy: a published code's sum over micro-batches, in place of the normaliser (`core.reduce.published_scales`)."""

    kind: Literal["constant", "sum", "sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One stream of an update: which per-token loss, how it is summed, and what its denominator is.

    The stream sees the `span` of each response, and its denominator counts that span: "all" tokens of it, or only those "kept"
    by `select`. `vocabulary` is what the loss needs of the whole distribution; the terms of an update share at most one.
    """

    name: str
    loss: TokenLoss
    coefficient: float = 1.0
    normalizer: NormalizerName = "token"
    constant_tokens: int | None = None
    span: SpanName = "response"
    select: TopEntropy | TopPrefixEntropy | None = None
    denominator: Literal["all", "kept"] = "all"
    uses_entropy_gradient: bool = False
    uses_old_policy: bool = False
    uses_reference: bool = False
    uses_sampler: bool = False
    uses_target: bool = False
    vocabulary: VocabularyStatistic | None = None
    published: PublishedSum | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Everything whose gradient enters one optimizer step: the set U of core.reduce."""

    sequences: tuple[Sequence, ...]
    terms: tuple[Term, ...]
    old_logprobs: tuple[tuple[float, ...], ...] | None = None  # per sequence; None: π_old is the current policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What was measured of an optimizer step that was taken: the norm of its gradient before clipping, and every term's part of
    the loss, its coefficient included."""

    grad_norm: float
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """Which elements an SFT phase must not move (S0 §3.2), decided from what RL moved before it."""

    top: float
    history: float
    mode: Literal["hard", "grad_zero"] = "hard"
    scope: Literal["global", "tensor"] = "global"
    fill_ties: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Train adapters in place of the weights: W x + (alpha / rank) B A x in every linear layer below the output layer."""

    rank: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resample:
    """Dynamic sampling: rounds of a phase's prompts until `groups` of them are kept, or `rounds` are over (DAPO).

    Kept are groups that are mixed; or those whose accuracy is within `accuracy`, both ends included (PRIME).
    """

    groups: int
    rounds: int
    accuracy: tuple[float, float] | None = None

    def keeps(self, group: Group) -> bool:
        """Whether a group counts."""
        return group.mixed if self.accuracy is None else self.accuracy[0] <= group.accuracy <= self.accuracy[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Another group of a problem of this step: all its rollouts begin with the first `prefix_tokens` of its demonstration."""

    problem_id: str
    prefix_tokens: int


Prefixes = Callable[[str, int], tuple[int, ...]]
"""How many tokens of its demonstration each rollout of a problem begins with, from the problem's id and the demonstration's
tokens; a function of nothing else that changes, so that a resumed run asks for the same."""

Retries = Callable[[SequenceOf[Group]], tuple[Retry, ...]]
"""What to sample again, from all groups of the step so far, in their order; () ends the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What the next step does.

    An "rl" or "mixed" step samples `prompts` × `rollouts`, again and again with `resample`; an "sft" step samples nothing.
    `prefixes` says which rollouts continue a demonstration, `retries` what is sampled again. `demonstrations` more problems are
    drawn without rollouts. `optimizer` names the optimizer whose moments it uses; `fresh` starts a phase without any, and its
    schedule anew. `freeze` holds for the whole phase. `reference` names what KL terms compare with: the model as it was loaded
    (None), or the policy as the first of the phases in a row with this name found it. Around an SFT phase that is not `metered`
    accuracy is not measured. With `scorer_learns` the method's second model scores every rollout of the step, and learns from
    them after that or before it. With `adapters` an "sft" phase trains new adapters, by a new optimizer with the settings of the
    one named, and ends by merging them into the weights.
    """

    name: Literal["rl", "sft", "mixed"]
    optimizer: Literal["rl", "sft"]
    prompts: int = 0
    rollouts: int = 0
    demonstrations: int = 0
    fresh: bool = False
    freeze: Freeze | None = None
    resample: Resample | None = None
    prefixes: Prefixes | None = None
    retries: Retries | None = None
    reference: str | None = None
    metered: bool = True
    scorer_learns: Literal["after", "before"] | None = None
    adapters: LowRank | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A share with its 95 % confidence bounds and the number of trials behind it."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Accuracy of a model on held-out problems.

    `accuracy` counts problems (the mean over their samples); `verdicts` counts answers; lengths are in tokens. `by_problem` is
    the share of correct answers of each problem, by its id: what a paired comparison needs.
    """

    accuracy: Interval
    by_problem: Mapping[str, float]
    response_length: float
    truncated: float
    verdicts: Mapping[str, int]
    by_source: Mapping[str, Interval]
    seconds: float
