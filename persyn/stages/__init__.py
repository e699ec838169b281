"""The arrows of the flow, one file each: ingest, calibrate, score, fit_router, assign, generate, export.

Those between the first and the last are worked as jobs, and each is three verbs: `plan` the jobs
for whatever is missing, `load` what one job needs, `save` results as they finish. What lies between
load and save is the engine's. Stages never call each other; they talk through tables.
"""
