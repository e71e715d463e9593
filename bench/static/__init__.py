"""What the compilers make of every kernel at the codec's real sizes; needs no GPU."""
