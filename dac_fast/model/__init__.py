"""The reference model's parts; `dac_fast.codec.DAC` puts them together."""
