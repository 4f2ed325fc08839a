"""Table codecs: small floats, signs and other levels that are looked up."""
