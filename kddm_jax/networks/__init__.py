"""Networks other than ResNet, projectors, and the weights of others."""
