"""How a ReLU Falcon is decoded on a CPU: decode weights, predictor, kernels, generation."""
