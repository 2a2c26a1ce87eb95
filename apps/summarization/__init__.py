"""Summaries of long documents: extractive, abstractive or both, with floors and faithfulness beside every figure."""

from core.training.app import App

APP = App(
    name="summarization",
    summary="summarise long documents, with or without a question",
    recipe="apps.summarization.recipe:SummarizationRecipe",
    data="apps.summarization.data:build_data",
    task="apps.summarization.task:build_task",
    floors="apps.summarization.baselines:floors",
    predict="apps.summarization.predict:predict",
    inspect="apps.summarization.inspect:inspect",
    metric="rouge1",
    better="higher",
)
