"""Which examples a step sees: a pure function of (seed, step), so that the step number is all there is to resume."""

import grain
import numpy as np


def batch_indices(examples: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices of the global batch of a step; each pass over the examples has a shuffle of its own."""
    order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
    start = step * batch
    return np.array([order[i] for i in range(start, start + batch)])
