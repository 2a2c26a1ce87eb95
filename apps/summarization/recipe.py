"""What a summarisation recipe may say; the line under a field is its help text. No torch here."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core.attention.registry import entry
from core.training.recipe import Recipe, Section
from core.training.sections import canonical_attention

Policy = Literal["error", "skip"]


class GeneratedSection(Section):
    """The generated documents of the demo: their best possible summary is known, see `generated.py`."""

    documents: int = Field(2000, ge=3)
    """Documents for training."""
    held_out: int = Field(16, ge=4)
    """Documents for validation, and as many for the test."""
    words: int = Field(16000, ge=64)
    """Words of the longest document of validation and test."""
    shortest: int = Field(8000, ge=64)
    """Words of the shortest one; lengths are spread evenly between the two."""
    train_words: int = Field(300, ge=64)
    """Words of the longest training document: what is learned on short ones is asked of long ones."""
    train_shortest: int = Field(64, ge=64)
    """Words of the shortest; between the two the logarithm of the length is spread evenly."""
    facts: int = Field(4, ge=1, le=12)
    """Marked facts that the summary asks for; as many unmarked ones stand beside them."""
    names: int = Field(24, ge=2, le=200)
    """Different values of a fact."""
    seed: int = Field(0, ge=0)
    """Of the documents; the seed of the run does not change the data."""

    @model_validator(mode="after")
    def _lengths_rise(self) -> Self:
        for least, most in (("shortest", "words"), ("train_shortest", "train_words")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                raise ValueError(f"{least} must not exceed {most}, got {low} > {high}")
        return self


class ColumnsSection(Section):
    """Names of the columns (or keys) of rows."""

    document: str = "document"
    """The text, or a list of sentences."""
    summary: str = "summary"
    """A summary, or a list of several."""
    query: str = "query"
    """What the summary is to answer; may be missing."""
    id: str = "id"
    """Name of the row; may be missing, then it is numbered."""
    gold: str = "gold"
    """Numbers, from 0, of the sentences that belong into the summary; may be missing."""


class DataSection(Section):
    """Where the documents come from, how they are checked, and how they are cut."""

    train: str | None = None
    """JSONL, CSV, TSV or Parquet file, or "hub:organisation/name@configuration:split"."""
    val: str | None = None
    """The same for validation; null: a share of the training documents."""
    test: str | None = None
    """The same for the test; null: a share of the training documents."""
    path: str | None = None
    """Folder of a data set in its own format (squality, scisummnet), where the user has it."""
    file: str | None = None
    """The same folder as a public name, looked for in LONGSPAN_DATA when `path` is not given."""
    origin: str | None = None
    """Where `file` can be had, for the error message when it is not there."""
    format: Literal["rows", "squality", "scisummnet"] = "rows"
    """Form of the data: rows with a document and its summary, or a data set in its own form."""
    generated: GeneratedSection | None = None
    """Make the documents instead of reading them."""
    columns: ColumnsSection = Field(default_factory=ColumnsSection)
    """Names of the columns of rows."""
    questions: Literal["all", "plot", "focused"] = "all"
    """squality: the question about the plot, the four others, or all five."""
    leak: Literal["strict", "clean", "abstract", "none"] = "clean"
    """scisummnet, whose summaries begin with the abstract: take out title and abstract (strict: and what repeats it in
    the body), abstract alone, or nothing."""
    min_words: int = Field(0, ge=0)
    """Documents of fewer words are dropped and counted."""
    val_share: float = Field(0.1, gt=0, lt=1)
    """Share of the training documents for validation, where no file is given; equal documents stay together."""
    test_share: float = Field(0.1, gt=0, lt=1)
    """The same for the test."""
    split_seed: int = Field(0, ge=0)
    """Of the shares; the seed of the run does not change the split."""
    on_bad: Policy = "error"
    """Rows that cannot be read: stop at the first, or skip, count and name them."""
    on_empty: Policy = "error"
    """Documents or summaries without a word."""
    on_duplicate: Literal["error", "skip", "keep"] = "error"
    """Two rows of one part with the same id: stop, keep the first, or keep all."""
    on_longer: Literal["error", "skip", "keep"] = "keep"
    """Summaries with more words than their document; they are counted in any case."""
    max_tokens: int | None = Field(None, ge=8)
    """Longest document in tokens (words for extractive models); null: none is cut. What is cut off is counted."""
    overflow: Literal["head", "head_tail"] = "head"
    """What stays of a longer document: its beginning, or beginning and end in equal shares."""


def _canonical_cross(value: Any) -> dict[str, Any]:
    value = canonical_attention(value)
    name = value.get("variant")
    if name is None or "cross" not in _can(name):
        raise ValueError(f"cross-attention must be one variant that can cross: softmax, hepos, linear; got {value!r}")
    return value


def _can(name: str) -> frozenset[str]:
    # The registry knows names and options without torch; of these three families the recipe knows that they cross.
    entry(name)
    return frozenset({"cross"}) if name in CROSSING else frozenset()


CROSSING = ("softmax", "hepos", "linear", "additive", "luong")
Cross = Annotated[dict[str, Any], BeforeValidator(_canonical_cross)]


WRITING = (
    *("tokenizer", "tokenizer_file", "vocabulary", "reader", "decoder_depth", "decoder_attention", "cross"),
    *("global_tokens", "pointer", "label_smoothing", "max_summary", "checkpoint", "drop_bias"),
)
"""Fields of `model` that only models that write have a use for."""


def _refuse_unused(section: Section, uses: dict[str, tuple[bool, tuple[str, ...]]]) -> None:
    """Raise ValueError where a field was changed that has no use; what is accepted is used."""
    for condition, (holds, names) in uses.items():
        for name in names:
            default = type(section).model_fields[name].get_default(call_default_factory=True)
            if not holds and getattr(section, name) != default:
                raise ValueError(f"{name} belongs to {condition} and would not be used here; leave it out")


class ModelSection(Section):
    """What stands around the backbone."""

    kind: Literal["extractive", "abstractive", "extract_abstract"] = "extractive"
    """Choose sentences; write a summary; or write it from sentences that an extractor chose."""
    words: int = Field(4000, ge=0)
    """extractive: words with a learned vector, the commonest of the training documents; 0: features alone."""
    word_dim: int = Field(32, ge=1)
    """extractive: width of a word's vector."""
    sentence_depth: int = Field(0, ge=0)
    """Attention layers inside a sentence before it becomes one vector; 0: a weighted mean of its words."""
    features: bool = True
    """extractive: place, section, length, centrality, likeness to the query and the like beside the learned vector."""
    query: Literal["global", "features", "both"] = "both"
    """extractive: how a question enters: tokens in front that are global where attention can, or features alone."""
    labels: Literal["oracle", "soft", "gold"] = "soft"
    """extractive, the target of a sentence: chosen by the greedy oracle, its own ROUGE, or marked in the file."""
    tokenizer: Literal["bpe", "unigram", "words", "bytes"] = "bpe"
    """abstractive: trained on the training documents and kept in the checkpoint; bytes need no training."""
    tokenizer_file: str | None = None
    """A tokenizer.json to use instead of training one."""
    vocabulary: int = Field(8000, ge=260)
    """Tokens of a trained tokenizer, at most."""
    reader: Literal["tokens", "patches", "sentences"] = "tokens"
    """abstractive, what a position of the encoder is: a token, `patch` tokens, or a sentence (hierarchical)."""
    patch: int = Field(8, ge=2)
    """Tokens of a patch."""
    sentence_tokens: int = Field(64, ge=4)
    """reader=sentences: longest sentence; longer ones are cut into several."""
    decoder_depth: int = Field(2, ge=1)
    """Blocks of the decoder."""
    decoder_attention: Annotated[dict[str, Any], BeforeValidator(canonical_attention)] = Field(
        default_factory=lambda: {"variant": "softmax"}
    )
    """Self-attention of the decoder; it must be causal, and recurrent for cached decoding."""
    cross: Cross = Field(default_factory=lambda: {"variant": "softmax"})
    """Cross-attention: softmax reads all positions, hepos every stride-th per head, linear a sum of constant size."""
    global_tokens: Literal["none", "first", "query", "separators"] = "none"
    """Positions that see all and are seen by all, for attention that can (longformer), and for a checkpoint of LED, of
    which the first is always one."""
    packed: bool = False
    """Lay the documents of a batch end to end for the encoder instead of padding them to the longest."""
    pointer: bool = False
    """Copying: the decoder may point at a token of the document (reader=tokens)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread over all tokens."""
    max_summary: int = Field(256, ge=4)
    """Longest summary in tokens, for training and for the table of positions; what is cut is counted."""
    source_words: int = Field(600, ge=10)
    """extract_abstract: words that the extractor hands on."""
    extractor: str | None = None
    """extract_abstract: run folder of an extractive recipe that chooses the sentences; null: LexRank, untrained."""
    checkpoint: str | None = None
    """abstractive: folder of a BART, LED or T5 checkpoint of transformers (config.json, weights, tokenizer.json), whose
    encoder gets this recipe's attention; backbone and decoder are then its own. Needs the extra hf."""
    drop_bias: bool = False
    """checkpoint of T5 with attention that takes no position bias: go on without it."""
    pretrained: str | None = None
    """Folder or weights of another run of the same model, to start from."""

    @model_validator(mode="after")
    def _options_meet_their_use(self) -> Self:
        writes, reader = self.kind != "extractive", self.reader
        uses = {
            "kind=extractive": (not writes, ("words", "word_dim", "features", "query", "labels")),
            "kind=abstractive": (writes, WRITING),
            "kind=extract_abstract": (self.kind == "extract_abstract", ("source_words", "extractor")),
            "reader=patches": (writes and reader == "patches", ("patch",)),
            "reader=sentences": (writes and reader == "sentences", ("sentence_tokens",)),
        }
        _refuse_unused(self, uses)
        if self.sentence_depth and writes and reader != "sentences":
            raise ValueError(f"sentence_depth belongs to kind=extractive and reader=sentences, got reader={reader}")
        if self.pointer and self.reader != "tokens":
            raise ValueError(f"pointer copies single tokens and needs reader=tokens, got reader={self.reader}")
        if self.checkpoint is not None:
            if self.kind == "extractive":
                raise ValueError("checkpoint belongs to kind=abstractive or extract_abstract")
            given = {"reader": "tokens", "pointer": False, "tokenizer_file": None, "packed": False}
            for name, plain in given.items():
                if getattr(self, name) != plain:
                    raise ValueError(f"checkpoint brings its own: leave {name} out, got {getattr(self, name)!r}")
        if self.tokenizer_file is not None and self.tokenizer == "bytes":
            raise ValueError("tokenizer_file and tokenizer=bytes exclude each other")
        if self.global_tokens == "query" and self.reader != "tokens":
            raise ValueError(
                f"global_tokens=query marks tokens of the question and needs reader=tokens, got {self.reader}"
            )
        return self


class PredictSection(Section):
    """How a summary is made; used by test and floors, and free to be changed for `longspan predict`."""

    words: int | None = Field(None, ge=1)
    """extractive: words to aim at; selection stops there, and a sentence that would pass 1.1 times this is skipped."""
    sentences: int | None = Field(None, ge=1)
    """extractive: most sentences; null with words=null: 3."""
    redundancy: float = Field(0.0, ge=0, le=1)
    """extractive: how much likeness to chosen sentences counts against a sentence (maximal marginal relevance)."""
    decoding: Literal["greedy", "beam", "sample"] = "greedy"
    """abstractive: the likeliest token each time, the best of several beams, or chance."""
    beams: int = Field(4, ge=2)
    """decoding=beam: hypotheses kept."""
    length_penalty: float = 1.0
    """decoding=beam: log-probabilities are divided by length to this power; larger favours longer summaries."""
    early_stopping: bool = True
    """decoding=beam: stop when as many hypotheses as beams have ended, not when none can become better."""
    no_repeat_ngram: int = Field(0, ge=0)
    """abstractive: no run of so many tokens comes twice; 0: no rule."""
    min_tokens: int = Field(0, ge=0)
    """abstractive: the summary may not end before."""
    max_tokens: int | None = Field(None, ge=1)
    """abstractive: the summary ends here; null: model.max_summary."""
    temperature: float = Field(1.0, gt=0)
    """decoding=sample: below 1 sharper, above 1 flatter."""
    top_k: int = Field(0, ge=0)
    """decoding=sample: only the so many likeliest tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """decoding=sample: only the likeliest tokens that together reach this probability."""
    seed: int = Field(0, ge=0)
    """decoding=sample: of the draws."""

    @model_validator(mode="after")
    def _options_meet_their_use(self) -> Self:
        uses = {
            "decoding=beam": (self.decoding == "beam", ("beams", "length_penalty", "early_stopping")),
            "decoding=sample": (self.decoding == "sample", ("temperature", "top_k", "top_p", "seed")),
        }
        _refuse_unused(self, uses)
        return self


class SummarizationRecipe(Recipe):
    """Summarisation: a document, perhaps a question, and a summary."""

    data: DataSection = Field(default_factory=DataSection)  # type: ignore[assignment]
    """Where the documents come from, how they are checked, and how they are cut."""
    model: ModelSection = Field(default_factory=ModelSection)  # type: ignore[assignment]
    """What stands around the backbone."""
    predict: PredictSection = Field(default_factory=PredictSection)  # type: ignore
    """How a summary is made."""
