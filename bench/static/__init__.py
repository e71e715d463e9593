"""What the compiler makes of every Triton kernel at the codec's real sizes; needs no GPU."""
