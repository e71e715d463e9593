"""The training step: ours against the published one."""
