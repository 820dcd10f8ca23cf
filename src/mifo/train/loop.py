"""The training loop. It reads like Algorithm 1 of S0; which method runs is not its business."""

from __future__ import annotations

from mifo.train.phases import change_stage_if_due
from mifo.train.run import Run
from mifo.train.stop import Stopped


def train(run: Run) -> None:
    """Run to the end, from the start or from where a checkpoint left off; or until `run.stop` is asked, which saves.

    What was saved is on the disk when this returns.

    Raises:
        CheckpointError: a checkpoint or a line of a log could not be written.
    """
    try:
        _turns(run)
    except Stopped:
        run.save_stopped()
    finally:
        run.close()


def _turns(run: Run) -> None:
    run.start()  # accuracy before training;  θ_RL,start ← θ,  B ← ∅,  C ← 0
    while not run.finished:
        change_stage_if_due(run)  # a run through several methods: the next one, with what belongs to it
        phase = run.method.next_phase()  # RL until |B| ≥ S, SFT until B = ∅
        run.enter(phase)  # RL→SFT: Δ, C̃, TopK, M.  SFT→RL: unfreeze, θ_RL,start ← θ
        groups = run.collect(phase)  # rollouts of π_old, R(o_i), acc(q), D(q)
        groups = run.score(phase, groups)  # V_t or q_t by a second model, which learns too, where the method has one
        updates = run.method.updates(phase, groups)  # A_i; hard questions join B, or B is consumed
        reports = run.learn(phase, updates)  # gradient, (1 − M) ⊙ g, clip, step, freeze
        run.method.learned(phase, [r.measured for r in reports if r.taken])  # SASR: G_last.  SuperRL: σ
        run.record(phase, groups, reports)  # metrics, samples, ledger
        run.evaluate_if_due()
        run.save_if_due()
        run.stop.check()
    run.finish()  # accuracy after training
