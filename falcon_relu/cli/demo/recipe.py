"""The settings of `falcon-relu demo`: every stage from text to sparse decoding."""

from __future__ import annotations

import dataclasses

from falcon_relu.errors import FalconError
from falcon_relu.generation import Sampling
from infer.predictor.fitting import FitConfig
from train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages. Paths are relative to the folder of the run.

    Attributes:
      corpora: names in `falcon_relu.corpora.CORPORA`.
      documents: maximum number of documents of each corpus; all if None.
      section_chars: length in characters at which texts are split, at blank lines, into documents; short documents
        make sure that the held-out ones come from every kind of text.
      vocab_size: V of the tokenizer, which is trained on the text.
      validation_fraction: fraction of the documents held out.
      teacher: the training run of the GELU model, from random weights.
      lm_only: the training run of a ReLU student with the next-token loss alone.
      lm_kl: the training run of a ReLU student with the next-token loss and distillation from the teacher.
      recorded_tokens: tokens whose activations are recorded to fit the predictors.
      rank: R of every predictor.
      fit: settings of the fit.
      reads: the operating points to measure, ascending, each the ratio of neurons read to neurons that fire.
      read: the one of `reads` that decoding uses.
      quality_batches: validation batches that each operating point is measured on.
      prompts: number of held-out texts to continue.
      prompt_tokens: tokens of each prompt.
      sampling: sampling settings of the continuations.
      widths: member of the family at whose widths decoding is timed, with random weights.
      widths_layers: number of its layers to time.
      widths_active: fraction of the neurons that the predictors choose there.
      widths_steps: decode steps to time.
      questions: maximum number of questions of each benchmark of the published suite; 0 for no benchmarks.
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
