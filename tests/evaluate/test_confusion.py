"""The confusion picture: which mistakes it lists, and that it is drawn for any number of classes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cmt_mae.evaluate.confusion import confusion_picture, most_frequent_mistakes


def test_mistakes_by_hand() -> None:
    confusion = torch.tensor([[9, 2, 0], [5, 1, 5], [0, 0, 7]])
    assert most_frequent_mistakes(confusion, 8) == [(1, 0, 5), (1, 2, 5), (0, 1, 2)]
    assert most_frequent_mistakes(confusion, 1) == [(1, 0, 5)]
    assert most_frequent_mistakes(torch.eye(4, dtype=torch.int64), 3) == []
    assert confusion[0, 0] == 9  # the matrix is left as it was


@pytest.mark.parametrize("classes", [1, 2, 30, 300])
def test_it_is_drawn_and_nothing_is_left_aside(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    confusion = torch.randint(0, 20, (classes, classes)) + 50 * torch.eye(
        classes, dtype=torch.int64
    )
    confusion[-1] = 0  # a class without images
    names = [f"a class with a rather long name, ${i}" for i in range(classes)]
    path = tmp_path / "pictures" / "confusion.png"
    confusion_picture(path, confusion, names, "step 3: top-1 50.0 % of 10 images", mistakes=4)
    image = Image.open(path).convert("L")
    assert 500 < image.width < 2000
    assert min(image.tobytes()) < 60  # ink
    assert list(path.parent.iterdir()) == [path]
