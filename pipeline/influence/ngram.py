"""`ngram`: how much a text's tokens look like the reference's. No model: the bar that influence has to beat."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.data.batch import IGNORE, Batch

BUCKETS = 1 << 16


class Ngram:
    """The log ratio of how often a token, and the pair of it and the one before, come in the reference and in the
    corpus,

        s_t = log p(x_t+1) / q(x_t+1) + log p(x_t, x_t+1) / q(x_t, x_t+1) ,

    p and q being frequencies of hashed n-grams in the reference and in the corpus, one added to each count (the
    importance weights of DSIR, arXiv 2302.03169, over tokens instead of words). Positive is more like the reference.
    """

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"validation", "document", "token", "score_first", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {}
    after_backward: ClassVar[bool] = False

    def __init__(self, reference: Iterable[Batch], corpus: Iterable[Batch], device: torch.device) -> None:
        of_reference, of_corpus = (_log_frequencies(batches) for batches in (reference, corpus))
        self._ratios = (of_reference - of_corpus).float().to(device)

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        single_BT, pair_BT = _ngrams(batch)
        return self._ratios[single_BT] + self._ratios[pair_BT]


def _ngrams(batch: Batch) -> tuple[Tensor, Tensor]:
    """The bucket of what each position is to predict, and of the pair that it makes with it; anything where there is
    no label."""
    now_BT, next_BT = batch.input_ids_BT, batch.labels_BT.clamp(min=0)
    return _hash(next_BT * 2 + 1), _hash((now_BT << 32) + next_BT * 2)


def _hash(keys: Tensor) -> Tensor:
    """To a bucket, by the finalizer of MurmurHash3, which every bit of a key changes half of."""
    for factor in (-49064778989728563, -4265267296055464877):
        keys = (keys ^ ((keys >> 33) & 0x7FFFFFFF)) * factor
    return (keys ^ ((keys >> 33) & 0x7FFFFFFF)) & (BUCKETS - 1)


def _log_frequencies(batches: Iterable[Batch]) -> Tensor:
    counts = torch.ones(BUCKETS, dtype=torch.float64)
    for batch in batches:
        labelled_BT = batch.labels_BT != IGNORE
        for buckets_BT in _ngrams(batch):
            counts += torch.bincount(buckets_BT[labelled_BT], minlength=BUCKETS)
    return (counts / counts.sum()).log()
