"""Where documents start, and what is no target, against a plain loop."""

import numpy as np
import pytest
from nmoe.data.documents import IGNORE_INDEX, Documents, document_starts, targets_without_eos

EOS = 9


def plain_starts(row):
    starts, start = [], 0
    for place, token in enumerate(row):
        starts.append(start)
        if token == EOS:
            start = place + 1
    return starts


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 33), (3, 128)])
def test_starts_and_targets(share, shape):
    draw = np.random.default_rng(0)
    sample = draw.integers(0, EOS, (shape[0], shape[1] + 1))
    sample[draw.random(sample.shape) < share] = EOS
    starts = document_starts(sample[:, :-1], EOS)
    assert starts.dtype == np.int32
    assert starts.shape == shape
    assert starts.tolist() == [plain_starts(row[:-1]) for row in sample]
    targets = targets_without_eos(sample, EOS)
    assert targets.dtype == np.int64
    assert targets.tolist() == [[IGNORE_INDEX if token == EOS else token for token in row[1:]] for row in sample]


def test_what_was_not_asked_for_is_not_there_and_samples_stay_as_they_are():
    sample = np.array([[1, EOS, 2, EOS, 3]])
    before = sample.copy()
    nothing = Documents(EOS, masking=False, loss_mask_eos=False)
    assert nothing.starts(sample) is None
    assert nothing.targets(sample) is None
    both = Documents(EOS, masking=True, loss_mask_eos=True)
    assert both.starts(sample).tolist() == [[0, 0, 2, 2]]
    assert both.targets(sample).tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 3]]
    assert np.array_equal(sample, before)
