"""Contains networks other than ResNet, projectors, and readers of weights."""
