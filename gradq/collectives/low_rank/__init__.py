"""Low rank (PowerSGD): matrices travel as products of two thin ones."""
