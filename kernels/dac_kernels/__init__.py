"""GPU and CPU kernels of neural audio codecs, usable with any model: import the module of the op you need."""
