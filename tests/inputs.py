"""Defines six samples by formulas, so that anyone can reproduce the literal numbers."""

import numpy as np

i, j = np.meshgrid(np.arange(6.0), np.arange(3.0), indexing="ij")
X = np.sin(1 + 0.7 * i + 1.3 * j)
Y = np.cos(0.5 + 1.1 * i - 0.4 * j) + 0.2 * j
S = 1.5 * np.sin(0.3 + i + 2 * j)
T = 1.2 * np.cos(0.9 * i - j)
Y5 = np.concatenate([Y, np.sin(2 * Y[:, :2])], axis=1)  # wider than the student
MAPS_X = np.sin(0.1 + 0.37 * np.arange(96)).reshape(2, 4, 4, 3)
MAPS_Y = np.cos(0.2 + 0.23 * np.arange(160)).reshape(2, 4, 4, 5)
BALANCED = np.array([0, 1, 0, 1, 1, 0])
UNBALANCED = np.array([0, 1, 0, 1, 1, 1])
