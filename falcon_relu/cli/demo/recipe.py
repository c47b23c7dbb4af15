"""The shape of a whole relufication, from text to sparse decoding, as `falcon-relu demo` runs it."""

from __future__ import annotations

import dataclasses

from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling
from infer.predictor.fitting import FitConfig
from train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of every stage. Paths in it are relative to the folder of the run.

    Attributes:
      corpora: names in `falcon_relu.corpora.CORPORA`.
      documents: of each corpus, at most; all if None.
      section_chars: texts are cut at blank lines into documents of about this length, so that the held-out ones are
        of every kind.
      vocab_size: of the tokenizer, which is trained on the text.
      validation_fraction: share of documents held out.
      teacher: trains the GELU model from nothing.
      lm_only: ReLU student, next-token loss alone.
      lm_kl: ReLU student, next-token loss and distillation from the teacher.
      recorded_tokens: tokens on which the predictors are fitted.
      rank: R of every predictor.
      fit: how they are fitted.
      reads: neurons to read over neurons that fire, ascending: the points of the curve of quality against reads.
      read: the one of them that decoding uses.
      quality_batches: validation batches that a point of that curve is measured on.
      prompts: held-out texts to continue.
      prompt_tokens: tokens of each prompt.
      sampling: how each is continued.
      widths: member of the family at whose widths decoding is timed, with random weights.
      widths_layers: layers of it.
      widths_active: share of the neurons that its predictor chooses.
      widths_steps: tokens that are timed.
      questions: of each benchmark of the published suite, at most; 0 leaves them out.
    """

    corpora: tuple[str, ...]
    documents: int | None = None
    section_chars: int
    vocab_size: int
    validation_fraction: float
    teacher: TrainConfig
    lm_only: TrainConfig
    lm_kl: TrainConfig
    recorded_tokens: int
    rank: int
    fit: FitConfig
    reads: tuple[float, ...]
    read: float
    quality_batches: int
    prompts: int
    prompt_tokens: int
    sampling: Sampling
    widths: str
    widths_layers: int
    widths_active: float
    widths_steps: int
    questions: int = 0

    def __post_init__(self) -> None:
        if self.read not in self.reads:
            raise FalconError(f"Recipe.read ({self.read}) must be one of reads {self.reads}")
