import torch
from torch.utils.data import Dataset

from core.training.data import Data


class Points(Dataset):
    def __init__(self, items, width, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(items, width, generator=generator)
        noise = 0.1 * torch.randn(items, 1, generator=generator)
        self.y = self.x @ torch.linspace(-1, 1, width)[:, None] + noise

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        return self.x[indices], self.y[indices]


def build_data(recipe):
    width = recipe.data.width
    return Data(
        train=Points(recipe.data.items, width, 0),
        val=Points(40, width, 1) if recipe.data.with_val else None,
        test=Points(50, width, 2),
        spec={"width": width},
        summary={"items": {"train": recipe.data.items, "test": 50}},
    )


def floors(recipe, data):
    zero = float((data.test.y**2).mean())
    return {"zero": {"mse": zero}}
