"""The main path: `gradient_sync` (a step), `layout` (chunks of a bucket), `plan` (codecs and collectives)."""
