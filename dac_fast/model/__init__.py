"""The reference model's parts: layers, autoencoder, quantizer; `dac_fast.codec.DAC` puts them together."""
