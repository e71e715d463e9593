"""Whether a provider computes the right thing, judged before it is timed."""
