"""`mifo paper`: findings of the papers put to the test, each with what was claimed, what was measured, and a verdict.

    tier      how much is trained: model, steps, seeds                            (tier.py)
    finding   a claim of a paper: which runs it needs, what is measured of them   (finding.py; s0_*.py, s2_*.py, ...)
    suite     runs what is not finished, measures, judges                         (suite.py)
    verdict   reproduces, does not, or cannot be told                             (lab.claims)

The verdicts follow from intervals by one rule for all findings, so that none can be argued into agreement.
"""
