"""The reference model: `DAC` and its parts."""

from dac_fast.model.codec import DAC, Encoded

__all__ = ["DAC", "Encoded"]
