"""The small model of tests that ask what happens to a model, whatever it is."""

from __future__ import annotations

from torch import nn


class Toy(nn.Module):
    """A body with batch norm and dropout, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))
