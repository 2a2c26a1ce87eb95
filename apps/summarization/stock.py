"""A converted checkpoint as a writer: the same batches, losses and summaries as `abstractive.Writer` (extra `hf`).

Tokens of the app are those of the checkpoint's tokenizer.json moved up by five, our specials being in front; here they
are moved back, and the checkpoint's own begin and end are put around every document and summary. In LED its begin is
global, as it was trained, and so are the question or the ends of sentences where `model.global_tokens` asks for them.
Decoding is that of transformers, with its caches.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.summarization.abstractive import Document
from apps.summarization.conversion import convert, load_stock
from apps.summarization.decoding import Speed, Written
from apps.summarization.recipe import PredictSection, SummarizationRecipe
from apps.summarization.tokens import END, PAD, SPECIAL
from apps.summarization.transformers_attention import need_transformers
from core.training.errors import UserError

SHIFT = len(SPECIAL)


class StockWriter(nn.Module):
    """A stock encoder-decoder with our attention.

    Args:
        inner: the converted model.
        smoothing: share of the target spread over the vocabulary.
    """

    def __init__(self, inner: nn.Module, smoothing: float = 0.0):
        super().__init__()
        self.inner: Any = inner
        self.smoothing = smoothing
        config: Any = inner.config
        self.end, self.pad = int(config.eos_token_id), int(config.pad_token_id)
        start = config.decoder_start_token_id
        self.start = int(self.end if start is None else start)
        # BART and its kin put begin and end around a document, T5 and PEGASUS the end alone.
        self.begin = int(config.bos_token_id) if config.model_type in ("bart", "led", "mbart") else None
        self.front = 0 if self.begin is None else 1

    def loss(self, document: Document, summary: Tensor) -> Tensor:
        """Mean negative log-likelihood of summary [B, T], BEGIN first, END last."""
        targets = self._back(summary[:, 1:], summary[:, 1:] == END)
        # What BART was trained to write begins with its begin token.
        if self.begin is not None:
            targets = F.pad(targets, (1, 0), value=self.begin)
        given = F.pad(targets[:, :-1], (1, 0), value=self.start)
        logits = self.inner(**self.source(document), decoder_input_ids=given, use_cache=False).logits
        return F.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=self.pad, label_smoothing=self.smoothing
        )

    @torch.no_grad()
    def write(
        self, document: Document, options: PredictSection, longest: int, speed: Speed, *, cached: bool = True
    ) -> list[Written]:
        """Summaries by transformers' `generate`."""
        most = min(options.max_tokens or longest, longest) + 1
        how: dict[str, Any] = {"num_beams": 1, "do_sample": False}
        if options.decoding == "beam":
            how |= {"num_beams": options.beams, "length_penalty": options.length_penalty}
            how |= {"early_stopping": options.early_stopping}
        elif options.decoding == "sample":
            how |= {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
            how |= {"top_k": options.top_k}
        started = time.perf_counter()
        with torch.random.fork_rng():  # the draws of validation must not touch those of training
            torch.manual_seed(options.seed)
            given = self.inner.generate(
                **self.source(document),
                max_new_tokens=most,
                min_new_tokens=options.min_tokens or None,
                no_repeat_ngram_size=options.no_repeat_ngram,
                return_dict_in_generate=True,
                use_cache=cached,
                **how,
            )
        found = given.sequences
        speed.seconds += time.perf_counter() - started
        speed.steps += found.shape[1] - 1
        speed.state_bytes = max(speed.state_bytes, _cache_bytes(given.past_key_values))
        rows = [[t for t in row[1:] if t not in (self.pad, self.end, self.begin)] for row in found.tolist()]
        ended = [self.end in row[1:] for row in found.tolist()]
        return [Written([t + SHIFT for t in row], 0.0, done) for row, done in zip(rows, ended)]

    def cost(self, tokens: int, positions: int, summary: int) -> dict[str, int]:
        """Parameters and tokens; FLOPs as 2 per weight and token, attention itself not counted."""
        parameters = sum(p.numel() for p in self.parameters())
        return {
            "parameters": parameters,
            "flops_per_item": 2 * parameters * (tokens + summary) // 2,
            "state_bytes": 0,
            "tokens_per_item": tokens,
        }

    def source(self, document: Document) -> dict[str, Tensor]:
        """Tokens of the app [B, M] -> the checkpoint's [B, M + 1 or 2] with begin and end, and its masks."""
        ids = document.ids
        lengths = (ids != PAD).sum(dim=1)
        rows = torch.full((len(ids), ids.shape[1] + 2), self.pad, dtype=ids.dtype, device=ids.device)
        front = self.front
        if self.begin is not None:
            rows[:, 0] = self.begin
        rows[:, front : front + ids.shape[1]] = self._back(ids, torch.zeros_like(ids, dtype=torch.bool))
        rows[torch.arange(len(ids)), lengths + front] = self.end
        rows = rows[:, : int(lengths.max()) + front + 1]
        mask = torch.arange(rows.shape[1], device=ids.device) <= (lengths + front)[:, None]
        found = {"input_ids": rows, "attention_mask": mask.long()}
        if self.inner.config.model_type == "led":
            wide = torch.zeros_like(rows)
            wide[:, 0] = 1
            if document.marked is not None:
                marked = document.marked[:, : rows.shape[1] - front]
                wide[:, front : front + marked.shape[1]] |= marked.long()
            found["global_attention_mask"] = wide
        return found

    def _back(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Numbers of the checkpoint; what stood for a special of ours becomes its end, padding its padding."""
        found = torch.where(ids >= SHIFT, ids - SHIFT, self.end)
        found = torch.where(ids == PAD, self.pad, found)
        return torch.where(ends, self.end, found)


def _cache_bytes(cache: Any) -> int:
    """Of one hypothesis: keys and values of self- and cross-attention in a cache of transformers."""
    parts = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    tensors = [x for part in parts if part is not None for layer in part.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() // x.shape[0] for x in tensors if x is not None)


def checkpoint_spec(recipe: SummarizationRecipe) -> dict[str, Any]:
    """What the data part needs of a checkpoint folder: its tokenizer, and the configuration to build it again.

    Raises:
        UserError: no such checkpoint, or global tokens for a model that has none.
    """
    assert recipe.model.checkpoint is not None
    model, tokenizer = load_stock(recipe.model.checkpoint)
    wide, family = recipe.model.global_tokens, model.config.model_type
    if wide != "none" and family != "led":
        raise UserError(f"model.global_tokens={wide} belongs to a checkpoint of LED; this is one of {family}")
    return {
        "tokenizer": {"kind": "checkpoint", "trained": tokenizer},
        "stock": model.config.to_dict(),
        "global_tokens": "none" if wide == "first" else wide,  # the first token is the begin, which is always global
    }


def build_stock(recipe: SummarizationRecipe, spec: dict[str, Any]) -> StockWriter:
    """The converted model: with the folder's weights where it is there, else bare, to take those of a run."""
    transformers = need_transformers()
    folder = recipe.model.checkpoint
    if folder is not None and (Path(folder).expanduser() / "config.json").is_file():
        model = load_stock(folder)[0]
    else:
        values = dict(spec["stock"])
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    converted = convert(
        model,
        recipe.attention,
        cross=recipe.model.cross,
        length=recipe.data.max_tokens and recipe.data.max_tokens + 2,
        drop_bias=recipe.model.drop_bias,
    )
    if recipe.backbone.checkpoint:
        # The older name is that of transformers 4.
        inner: Any = converted
        known = hasattr(inner, "activation_checkpointing_enable")
        (inner.activation_checkpointing_enable if known else inner.gradient_checkpointing_enable)()
    # `from_pretrained` leaves a model in evaluation mode; here it is about to learn.
    return StockWriter(converted, recipe.model.label_smoothing).train()
