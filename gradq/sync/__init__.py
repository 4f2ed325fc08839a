"""The main path: `gradient_sync` (a step), `layout` (how parameters travel), `bucket` (their exchanges)."""
