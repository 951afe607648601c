"""The field's measures, as modules of `evaluate` that load by path, also without a network:

    import evaluate
    evaluate.load("metrics/emotion").compute(predictions=["joy", None], references=["joy", "anger"])

Each folder stands alone: `measures.py` has the formulas, in NumPy, and is what `eval.py` calls; the other file is the
module. An unparsable answer is None, in an array of scores NaN. It is a wrong answer of no class wherever answers are
counted right or wrong, is left out where a distance is measured, and `unparsable` says how many there were. A figure
that is not defined (the correlation of a constant, the agreement on no samples) is None.
"""
