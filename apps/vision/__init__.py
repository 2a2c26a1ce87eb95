"""Images at high resolution: classification, segmentation and dense regression with any attention, timm's ViTs too."""

from core.training.app import App

APP = App(
    name="vision",
    summary="classify or segment large images, also with timm's models",
    recipe="apps.vision.recipe:VisionRecipe",
    data="apps.vision.data:build_data",
    task="apps.vision.task:build_task",
    floors="apps.vision.baselines:floors",
    predict="apps.vision.predict:predict",
    metric="accuracy",
    better="higher",
    inspect="apps.vision.inspect:inspect",
    sized="apps.vision.costs:sized",
)
