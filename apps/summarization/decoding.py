"""From an encoded document to a summary: greedy, beam search, sampling; with a cache, or anew for every token.

The score of a hypothesis is sum of log-probabilities / length**penalty, as in transformers: a larger penalty favours
longer summaries, 0 does not normalise. Both ways of decoding give the same tokens; the cached one costs a step of the
decoder per token, the other a pass over all tokens so far (it is the definition that tests compare with).
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.summarization.abstractive import Document, Memory, Writer, reorder
from apps.summarization.recipe import PredictSection
from apps.summarization.tokens import BEGIN, END, PAD, SEPARATOR, UNKNOWN


@dataclass
class Written:
    """One summary.

    tokens: without begin and end.   score: log-probability, for beams divided by length**penalty.
    ended: False where it was cut at the maximum length.
    """

    tokens: list[int]
    score: float
    ended: bool


@dataclass
class Speed:
    """What decoding cost: seconds and steps, and bytes of the decoder's state of one document at the end."""

    seconds: float = 0.0
    steps: int = 0
    state_bytes: int = 0

    @property
    def ms_per_token(self) -> float:
        """Of a whole batch: the time of one step."""
        return 1000 * self.seconds / max(1, self.steps)


class Stepper:
    """Gives log-probabilities of the next token for hypotheses [R, t] of B documents, R / B of each, side by side."""

    def __init__(self, model: Writer, memory: Memory, rows: int, *, cached: bool):
        self.model, self.memory, self.cached = model, memory, cached
        self.beams = rows // memory.vectors.shape[0]
        self.states = model.start(memory, self.beams) if cached else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """[R, V] after tokens [R, t], which hold one token more than at the last call."""
        if self.states is not None:
            found, self.states = self.model.step(tokens[:, -1], self.states, self.memory)
            return found
        model, memory = self.model, self.memory
        context, mask = (
            x.repeat_interleave(self.beams, 0) if self.beams > 1 else x for x in (memory.vectors, memory.mask)
        )
        states = model.decoder(model.table(tokens) * model.scale, context, context_mask=mask)
        return model.predict(states[:, -1:], memory)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with these hypotheses; row i replaces one of the same document."""
        if self.states is not None:
            self.states = reorder(self.states, rows)

    def state_bytes(self) -> int:
        """Of one hypothesis, what is remembered of the document included."""
        tensors = [x for state in self.states or [] for x in state.values()]
        return sum(x.numel() * x.element_size() // x.shape[0] for x in tensors)


@torch.no_grad()
def write(
    model: Writer,
    document: Document,
    options: PredictSection,
    longest: int,
    *,
    cached: bool = True,
    speed: Speed | None = None,
) -> list[Written]:
    """A summary for each document of a batch.

    Args:
        model: in evaluation mode.
        document: the batch.
        options: how; `options.max_tokens` None means `longest`.
        longest: tokens that the decoder was built for.
        cached: keep decoding states between tokens.
        speed: takes the cost.
    """
    memory = model.encode(document)
    most = min(options.max_tokens or longest, longest)
    decode = {"greedy": _single, "sample": _single, "beam": _beams}[options.decoding]
    beams = options.beams if options.decoding == "beam" else 1
    stepper = Stepper(model, memory, len(memory.vectors) * beams, cached=cached)
    started = time.perf_counter()
    found, steps = decode(stepper, len(memory.vectors), options, most)
    if speed is not None:
        speed.seconds += time.perf_counter() - started
        speed.steps += steps
        speed.state_bytes = max(speed.state_bytes, stepper.state_bytes())
    return found


def _allowed(scores: Tensor, tokens: Tensor, options: PredictSection) -> Tensor:
    """Scores [R, V] with what may not come next at -inf; tokens [R, t] so far, BEGIN included."""
    scores = scores.clone()
    scores[:, [PAD, BEGIN, UNKNOWN, SEPARATOR]] = -torch.inf
    if tokens.shape[1] - 1 < options.min_tokens:
        scores[:, END] = -torch.inf
    size = options.no_repeat_ngram
    if size and tokens.shape[1] >= size:
        for row, so_far in enumerate(tokens.tolist()):
            last = so_far[len(so_far) - size + 1 :]
            banned = {
                so_far[i + size - 1] for i in range(1, len(so_far) - size + 1) if so_far[i : i + size - 1] == last
            }
            scores[row, list(banned)] = -torch.inf
    # Where all is forbidden the summary ends.
    scores[scores.isneginf().all(dim=1), END] = 0.0
    return scores


def _single(stepper: Stepper, batch: int, options: PredictSection, most: int) -> tuple[list[Written], int]:
    """Greedy or sampled, one hypothesis per document."""
    device = stepper.memory.vectors.device
    generator = torch.Generator(device).manual_seed(options.seed)
    tokens = torch.full((batch, 1), BEGIN, dtype=torch.int64, device=device)
    total = torch.zeros(batch, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    steps = 0
    while steps < most and not bool(ended.all()):
        scores = _allowed(stepper(tokens), tokens, options)
        chosen = scores.argmax(1) if options.decoding == "greedy" else _draw(scores, options, generator)
        total += torch.where(ended, 0.0, scores.gather(1, chosen[:, None])[:, 0])
        chosen = torch.where(ended, PAD, chosen)
        ended |= chosen == END
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        steps += 1
    rows = [[t for t in row[1:] if t not in (PAD, END)] for row in tokens.tolist()]
    return [Written(row, float(s), bool(e)) for row, s, e in zip(rows, total, ended)], steps


def _draw(scores: Tensor, options: PredictSection, generator: torch.Generator) -> Tensor:
    """Tokens [B] by chance, from the likeliest alone where top_k or top_p say so."""
    logits = scores / options.temperature
    if options.top_k:
        least = logits.topk(min(options.top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if options.top_p < 1:
        ordered, index = logits.softmax(dim=1).sort(dim=1, descending=True)
        outside = ordered.cumsum(dim=1) - ordered >= options.top_p  # the first one to pass the share still belongs
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def _beams(stepper: Stepper, batch: int, options: PredictSection, most: int) -> tuple[list[Written], int]:
    """Beam search over all documents at once, `beams` rows each."""
    width, device = options.beams, stepper.memory.vectors.device
    penalty = options.length_penalty
    tokens = torch.full((batch * width, 1), BEGIN, dtype=torch.int64, device=device)
    total = torch.full((batch, width), -torch.inf, device=device)
    total[:, 0] = 0.0  # all beams are alike at first: only one may be continued
    finished: list[list[Written]] = [[] for _ in range(batch)]
    done = [False] * batch
    length = 0
    while length < most and not all(done):
        length += 1
        scores = _allowed(stepper(tokens), tokens, options)
        vocabulary = scores.shape[1]
        candidates = (total[:, :, None] + scores.view(batch, width, -1)).flatten(1)
        best, index = candidates.topk(min(2 * width, candidates.shape[1]), dim=1)
        rows = torch.arange(batch * width, device=device).view(batch, width).clone()
        chosen = torch.full((batch, width), PAD, dtype=torch.int64, device=device)
        for b in range(batch):
            if done[b]:
                continue
            place = 0
            new = torch.full((width,), -torch.inf, device=device)
            for rank, (value, flat) in enumerate(zip(best[b].tolist(), index[b].tolist())):
                beam, token = divmod(flat, vocabulary)
                if value == -torch.inf:
                    break
                row = b * width + beam
                if token == END:
                    if rank < width:
                        finished[b].append(Written(tokens[row, 1:].tolist(), value / length**penalty, True))
                elif place < width:
                    rows[b, place], chosen[b, place], new[place] = row, token, value
                    place += 1
            total[b] = new
            done[b] = place == 0 or _settled(finished[b], float(new[0]), length, most, options)
        rows = rows.flatten()
        tokens = torch.cat([tokens[rows], chosen.view(-1, 1)], dim=1)
        stepper.keep(rows)
    found = []
    for b in range(batch):
        if not finished[b]:  # none came to an end: the best of those that were cut
            row = tokens[b * width, 1:].tolist()
            finished[b].append(
                Written([t for t in row if t != PAD], float(total[b, 0]) / max(1, len(row)) ** penalty, False)
            )
        found.append(max(finished[b], key=lambda one: one.score))
    return found, length


def _settled(finished: list[Written], best: float, length: int, most: int, options: PredictSection) -> bool:
    """Whether no more is to be had for a document: enough have ended, and, unless early, none can become better."""
    if len(finished) < options.beams:
        return False
    if options.early_stopping:
        return True
    reach = most if options.length_penalty > 0 else length  # a longer one divides its negative sum by more
    return best / reach**options.length_penalty <= sorted(one.score for one in finished)[-options.beams]
