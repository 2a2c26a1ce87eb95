"""A sequence of any length through a causal model in one pass: what it has read lives in states of constant size."""

import torch
from torch import Tensor

from apps.genomics.language import LanguageTask
from apps.genomics.shortcuts import MarkovShortcut
from apps.genomics.task import GenomicsTask
from core.attention.registry import available, variant_class
from core.training.errors import UserError


class Stream:
    """Reads tokens chunk by chunk; any cut into chunks gives what one forward pass over the whole gives.

    Args:
        task: a causal language model.

    Raises:
        UserError: it is not causal, or its states grow with what they have read.
    """

    def __init__(self, task: LanguageTask):
        check_streams(task)
        self.task, self.model = task, task.model
        markov = self.model.shortcut.reach if isinstance(self.model.shortcut, MarkovShortcut) else 0
        self.reach = max(self.model.stem.reach if self.model.stem is not None else 0, markov)
        self.states = self.model.encoder.init_state(1)
        self.tail = torch.zeros(0, dtype=torch.int64)  # inputs that convolutions and tables still look at
        self.last = torch.tensor([self.model.tokens.start])

    def feed(self, ids: Tensor) -> Tensor:
        """Logits [n, K] of the tokens ids [n] given all that were fed before, and those before them in ids."""
        inputs = torch.cat([self.last, ids[:-1]])
        both = torch.cat([self.tail, inputs]).unsqueeze(0)
        mask, seen = torch.ones_like(both, dtype=torch.bool), len(self.tail)
        x = self.model.embedded(both, mask)[:, seen:]
        x, self.states = self.model.encoder.prefill(x, self.states)
        logits = self.model.head(x)
        if self.model.shortcut is not None:
            logits = logits + self.model.shortcut(both, mask)[:, seen:]
        self.last = ids[-1:]
        self.tail = both[0, max(0, both.shape[1] - self.reach) :] if self.reach else self.tail
        return logits[0].float()

    @property
    def state_bytes(self) -> int:
        """Size of all states."""
        return sum(tensor.nbytes for state in self.states for tensor in state.values())


def check_streams(task: GenomicsTask) -> None:
    """Raise UserError unless the model reads on with states of constant size."""
    if not isinstance(task, LanguageTask) or not task.causal:
        raise UserError("predict.stream reads on through the state of a causal model; this run is of another task")
    encoder = task.model.encoder
    names = {block.attention.variant.name for block in encoder}
    recurrent = {name for name in names if "recurrent" in variant_class(name).can}
    if names - recurrent or encoder.cost(1, 2**20).state_bytes > encoder.cost(1, 2**19).state_bytes:
        able = ", ".join(n for n in ("linear", "hybrid", "window", "gla", "delta", "ssd", "retnet") if n in available())
        raise UserError(
            f"predict.stream needs a state of constant size, that of {', '.join(sorted(names))} is none or grows with "
            f"the length; train with one of {able}, or leave predict.stream out"
        )
    if encoder.positions == "learned":
        raise UserError("predict.stream goes beyond the table of backbone.positions=learned; train without positions")


def stream_nats(task: LanguageTask, ids: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood [N] of every token, read `chunk` at a time; 0 where a token is not asked."""
    stream, found = Stream(task), []
    for part in ids.split(chunk):
        logits = stream.feed(part)
        asked = part < logits.shape[-1]
        chosen = part.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)
        found.append(-logits.log_softmax(-1).gather(-1, chosen).squeeze(-1) * asked)
    return torch.cat(found)
