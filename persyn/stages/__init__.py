"""The stages of a run that are worked as jobs: calibrate, score, fit_router, assign and generate.

Each stage has three verbs: `plan` creates jobs for missing rows, `load` reads what one job needs, `save` stores results
as they arrive. An engine computes between `load` and `save`. Stages never call each other; they communicate through
tables.
"""
