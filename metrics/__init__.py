"""The benchmarks' metrics as `evaluate` modules, which load by path and need no network:

    import evaluate
    evaluate.load("metrics/emotion").compute(predictions=["joy", None], references=["joy", "anger"])
    evaluate.load("metrics/sentiment", "mosei").compute(predictions=[0.4, None], references=[0.6, -1.0])

Each folder is independent of the others. `measures.py` contains the formulas, which `eval.py` calls; the other file
is the `evaluate` module. An unparsable answer is None, or NaN in an array of scores. It counts as a wrong answer that
belongs to no class, is excluded from errors and correlations, and is counted in `unparsable`. An undefined metric,
such as the correlation of a constant, is None.
"""
