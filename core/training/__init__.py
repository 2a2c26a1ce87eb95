"""Training glue around Lightning: recipes, runs, comparisons and the command line.

Nothing is imported here, so that the command starts at once. The names that apps and scripts use:

    core.training.app        App
    core.training.recipe     Recipe, Section, load_recipe, recipes, dump, schema        (no torch)
    core.training.data       Data, EpochOrder
    core.training.task       Task
    core.training.fit        fit, evaluate
    core.training.predict    predict
    core.training.run        RunResult, LoadedRun, load_run, load_model
    core.training.errors     UserError, RunFailed, Interrupted                          (no torch)
"""
