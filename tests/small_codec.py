"""A codec and discriminators that train in a moment, as overrides of a recipe."""

SMALL = (
    "model.encoder_dim=4",
    "model.encoder_rates=[2,4]",
    "model.decoder_dim=16",
    "model.decoder_rates=[4,2]",
    "model.n_codebooks=3",
    "model.codebook_size=16",
    "model.sample_rate=8000",
    "discriminator.periods=[]",
    "discriminator.fft_sizes=[256,128]",
    "losses.mel_windows=[64,128]",
    "losses.mel_bins=[5,10]",
)
