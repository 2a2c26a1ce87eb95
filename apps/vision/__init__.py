"""Images at high resolution: classification, segmentation and dense regression with any attention, timm's ViTs too."""

from core.training.app import App, Sheet

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
    side_by_side="apps.vision.inspect:side_by_side",
    sheet=Sheet(
        "inside.png",
        "What the attention reads",
        "The same test image in the trained model of every variant. Left: the image as the model sees it. Then what "
        "the token under the first cross, in the middle, reads in the first and in the last layer: its row of the "
        "attention matrix, mean over the heads, implicit where a mechanism forms no matrix; and the same of a second "
        "token. Right: the pixels that move the middle token after the last layer, its effective receptive field. "
        "Colours run from 0, dark, to the largest weight of a panel, yellow, on a square-root scale; blue is below 0. "
        "Under a panel: that largest weight, and the sum of the row, which is 1 where a mechanism is normalised.",
    ),
    sized="apps.vision.costs:sized",
)
