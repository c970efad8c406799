"""train: one stage on DeepSpeed, from its plan and the weights before it to a checkpoint."""
