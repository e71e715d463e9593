"""GPU and CPU kernels of neural audio codecs, for any model: import the module of the op needed."""
