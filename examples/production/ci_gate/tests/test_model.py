"""What the model computes."""

import torch
from ranker import PADDING, Ranker


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = Ranker(vocabulary=64, width=16).eval()
    text = torch.randint(1, 64, (2, 5))
    padded = torch.cat([text, torch.full((2, 3), PADDING)], dim=1)
    torch.testing.assert_close(model.encode(padded), model.encode(text))


def test_a_text_is_nearest_to_itself():
    torch.manual_seed(0)
    model = Ranker(vocabulary=64, width=16).eval()
    passages = torch.randint(1, 64, (3, 4, 5))
    scores = model(passages[:, 2], passages)
    assert scores.shape == (3, 4)
    assert scores.argmax(1).tolist() == [2, 2, 2]
