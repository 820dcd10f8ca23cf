"""The training loop. It reads like Algorithm 1 of S0; which method runs is not its business."""

from __future__ import annotations

from mifo.train.run import Run


def train(run: Run) -> None:
    """Run to the end, from the start or from where a checkpoint left off."""
    run.start()  # accuracy before training;  θ_RL,start ← θ,  B ← ∅,  C ← 0
    while not run.finished:
        phase = run.method.next_phase()  # RL until |B| ≥ S, SFT until B = ∅
        run.enter(phase)  # RL→SFT: Δ, C̃, TopK, M.  SFT→RL: unfreeze, θ_RL,start ← θ
        groups = run.collect(phase)  # rollouts of π_old, R(o_i), acc(q), D(q)
        updates = run.method.updates(phase, groups)  # A_i; hard questions join B, or B is consumed
        reports = run.learn(phase, updates)  # gradient, (1 − M) ⊙ g, clip, step, freeze
        run.record(phase, groups, reports)  # metrics, samples, ledger
        run.save_if_due()
        if run.interrupted:
            return run.save()
    return run.finish()  # accuracy after training, export
