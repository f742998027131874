"""How fast the model is: beside itself at another revision, and beside the way it was first written."""

import pytest
import torch
import workload
from ranker import Ranker


@pytest.mark.kpt(max_slowdown=0.05, name="ranker")
def test_not_slower_than_the_base_revision(kpt):
    """Compares with the revision that `pytest --kpt-base REV` names, and is skipped without."""
    kpt.against(target="perf/workload.py:workload")


def test_passages_are_encoded_at_once_and_not_one_by_one(kpt):
    """Both ways stand in one process: nothing else differs, so that the test needs no other revision."""
    torch.manual_seed(0)
    model = Ranker(workload.VOCABULARY).eval()
    question, passages = (words[..., :2] for words in workload.inputs(seed=0))  # short, so that calls are what costs

    def one_by_one():
        scores = [model(question, passages[:, i : i + 1]) for i in range(passages.shape[1])]
        return torch.cat(scores, dim=1)

    with torch.no_grad():
        torch.testing.assert_close(model(question, passages), one_by_one())
        kpt.compare(base=one_by_one, head=lambda: model(question, passages))
