"""DNA and protein: sequence files in; answers per sequence, base or variant out; floors beside every figure."""

from core.training.app import App

APP = App(
    name="genomics",
    summary="classify, regress, annotate and model DNA and protein sequences",
    recipe="apps.genomics.recipe:GenomicsRecipe",
    data="apps.genomics.data:build_data",
    task="apps.genomics.task:build_task",
    floors="apps.genomics.baselines:floors",
    predict="apps.genomics.predict:predict",
    inspect="apps.genomics.inspect:inspect",
    metric="mcc",
    better="higher",
)
