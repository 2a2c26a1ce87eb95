"""A checkpoint of BART, LED or T5 on disk becomes a long encoder-decoder with attention of our core (extra `hf`).

    encoder self-attention   any variant that is bidirectional; LED keeps its global tokens beside it, see `led.py`
    cross-attention          as it is, or any variant that can cross: hepos, linear
    positions                the learned table grown by repetition (BART, LED), as Longformer was made from RoBERTa; the
                             computed one of PEGASUS computed further

With softmax, or a window as long as the input, the outputs are those of the original. What is lost: T5's bias of
relative positions where the variant takes none (it must be said, `drop_bias`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.summarization.led import LedCross, LedSelf
from apps.summarization.transformers_attention import attach, need_transformers, register
from core.training.errors import UserError

FAMILIES = ("bart", "mbart", "pegasus", "led", "t5")


def load_stock(folder: str | Path) -> tuple[Any, str]:
    """The model of a checkpoint folder and its tokenizer.json; nothing is downloaded.

    Raises:
        UserError: no such folder, a model of another family, or no tokenizer.json.
    """
    transformers = need_transformers()
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise UserError(f"model.checkpoint: {path} holds no config.json; name a checkpoint folder on disk")
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"model.checkpoint: {path} holds no tokenizer.json; save the fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"model.checkpoint: {path} is a {config.model_type!r} model; known: {known}")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, local_files_only=True)
    return model, (path / "tokenizer.json").read_text()


def convert(
    model: nn.Module,
    attention: dict[str, Any],
    *,
    cross: dict[str, Any] | None = None,
    length: int | None = None,
    drop_bias: bool = False,
) -> nn.Module:
    """Swap the attention of a stock encoder-decoder in place.

    Args:
        model: BART-, LED- or T5-like, with its weights.
        attention: `{"variant": name, **options}` of the encoder.
        cross: the same of the cross-attention; None: it stays as it is.
        length: positions that the encoder is to have; None: as many as it has.
        drop_bias: T5 with a variant that takes no position bias: go on without it.

    Raises:
        ValueError: the family does not allow it.
    """
    family = model.config.model_type  # type: ignore[union-attr]
    encoder: Any = model.get_encoder()  # type: ignore[operator]
    options = dict(attention)
    name = options.pop("variant")
    if family == "led":
        for layer in encoder.layers:
            layer.self_attn.longformer_self_attn = LedSelf(layer.self_attn.longformer_self_attn, name, options)
    else:
        if family == "t5" and name != "softmax":
            _without_bias(encoder, name, drop_bias)
        for module in _self_attention(encoder):
            attach(module, name, **options)
        model.set_attn_implementation(register())  # type: ignore[operator]
    if cross is not None and cross.get("variant") != "softmax":
        options = dict(cross)
        name = options.pop("variant")
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        if family == "led":
            for layer in decoder.layers:
                layer.encoder_attn = LedCross(layer.encoder_attn, name, options)
        else:
            for module in _cross_attention(decoder):
                attach(module, name, **options)
    if length is not None:
        grow_positions(encoder, length)
        if hasattr(model.config, "max_encoder_position_embeddings"):
            model.config.max_encoder_position_embeddings = length  # type: ignore[union-attr]
    return model


def grow_positions(encoder: nn.Module, length: int) -> None:
    """Repeat the learned position table until it has `length` rows; models without a table are long enough.

    Raises:
        ValueError: the table is longer already; it is not cut.
    """
    table = getattr(encoder, "embed_positions", None)
    if not isinstance(table, nn.Embedding):
        return
    offset = getattr(table, "offset", 0)
    old = table.weight.data
    known = len(old) - offset
    if known > length:
        raise ValueError(f"the position table has {known} rows, more than the {length} asked for")
    rows = old[offset:]
    grown = torch.cat([old[:offset], *([rows] * (-(-length // known)))])[: length + offset]
    table.weight = nn.Parameter(grown.clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(grown)
    if hasattr(table, "create_weight"):  # sinusoids, of which there are more
        table.weight.data = table.create_weight().to(old)  # type: ignore[operator]


def _self_attention(encoder: Any) -> list[nn.Module]:
    if hasattr(encoder, "block"):  # T5
        return [block.layer[0].SelfAttention for block in encoder.block]
    return [layer.self_attn for layer in encoder.layers]


def _cross_attention(decoder: Any) -> list[nn.Module]:
    if hasattr(decoder, "block"):
        return [block.layer[1].EncDecAttention for block in decoder.block]
    return [layer.encoder_attn for layer in decoder.layers]


def _without_bias(encoder: Any, name: str, drop_bias: bool) -> None:
    if not drop_bias:
        raise ValueError(
            f"T5 tells positions apart by a bias that attention {name!r} does not take; "
            "drop_bias=True goes on without it (and needs training), softmax keeps it"
        )
    for block in encoder.block:
        attention = block.layer[0].SelfAttention
        attention.has_relative_attention_bias = False
        if hasattr(attention, "relative_attention_bias"):
            del attention.relative_attention_bias
