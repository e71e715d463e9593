"""Whether a peer computes the right thing, judged before it is timed."""
