"""A record made by hand, and a reader of all its steps."""

import tiny_models
import torch
from palimpsest.nodes.attention_map.nodes import ReadAttentionMap
from palimpsest.nodes.attention_map.record import AttentionRecord, RecordedRun


def read(record, samples=None, **settings):
    """The reader's outputs with all steps."""
    samples = None if samples is None else {"samples": samples}
    settings = {"start_percent": 0.0, "clean": 0} | settings
    return tiny_models.execute(ReadAttentionMap, record=record, samples=samples, **settings)


def made(pictures=2, words=("red cat", "snow")):
    """A record of a bright left half (first word) and a bright lower right quarter (second)."""
    found = AttentionRecord(words, needs_samples=False)
    level = torch.full((4, pictures, len(words), 8, 8), 0.01)
    level[:, :, 0, :, :4] = 0.2
    if len(words) > 1:
        level[:, :, 1, 4:, 4:] = 0.1
    level[0] = torch.nan
    found.add(RecordedRun(torch.zeros(pictures, 4, 8, 8), {(8, 8): level}))
    return found
