"""Where documents begin in samples, told by the EOS that ends each: for attention and for the loss.

Shapes: B samples, S inputs of each; a sample holds S + 1 tokens.
"""

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
"""A target that adds nothing to a loss."""


class Documents:
    """What of its samples a run hides from attention and from the loss, by the EOS that ends every document."""

    def __init__(self, eos_id: int, *, masking: bool, loss_mask_eos: bool) -> None:
        self._eos_id, self._masking, self._loss_mask_eos = eos_id, masking, loss_mask_eos

    def starts(self, sample_BS1: npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        """Where the document of each input position starts (`document_starts`); None: attention hides nothing."""
        return document_starts(sample_BS1[:, :-1], self._eos_id) if self._masking else None

    def targets(self, sample_BS1: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Targets with -100 instead of EOS (`targets_without_eos`); None: every token is a target."""
        return targets_without_eos(sample_BS1, self._eos_id) if self._loss_mask_eos else None


def document_starts(input_BS: npt.NDArray[np.int64], eos_id: int) -> npt.NDArray[np.int32]:
    """For each input position the first position of its document in the sample, int32 (B, S).

    0 where the document began before the sample. An EOS belongs to the document that it ends.
    """
    batch, length = input_BS.shape
    after_eos = np.flatnonzero(input_BS == eos_id) + 1
    first = np.union1d(after_eos, np.arange(0, batch * length, length))  # of each document, over all samples
    first = first[first < batch * length]
    sizes = np.diff(first, append=batch * length)
    return np.repeat((first % length).astype(np.int32), sizes).reshape(batch, length)


def targets_without_eos(sample_BS1: npt.NDArray[np.int64], eos_id: int) -> npt.NDArray[np.int64]:
    """The S targets of each sample, int64 (B, S), with -100 instead of EOS."""
    target_BS = sample_BS1[:, 1:].copy()
    target_BS[target_BS == eos_id] = IGNORE_INDEX
    return target_BS
