"""The measures of the benchmarks, as `evaluate` modules that load by path, also without a network:

    import evaluate
    evaluate.load("metrics/emotion").compute(predictions=["joy", None], references=["joy", "anger"])
    evaluate.load("metrics/sentiment", "mosei").compute(predictions=[0.4, None], references=[0.6, -1.0])

Each folder stands alone: `measures.py` holds the formulas and is what `eval.py` calls; the other file is the module.
An unparsable answer is None, or NaN in an array of scores. It counts as a wrong answer of no class, is left out of
distances, and is counted in `unparsable`. An undefined measure (the correlation of a constant) is None.
"""
