"""Files: both .dac formats, checkpoints, downloads."""
