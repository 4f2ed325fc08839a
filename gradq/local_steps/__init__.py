"""Local steps: models that are averaged now and then instead of in every step (`LocalSGD`, `DiLoCo`)."""
