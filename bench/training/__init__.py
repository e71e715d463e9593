"""The training step against the published composition."""
