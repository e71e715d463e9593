"""The peers: ways to compute an op, run the whole codec, or make a step of training."""
