"""Benchmarks: what compression saves on your nodes with your model, and whether the model still learns.

In reading order: `scenario.py` (what is asked), `worker.py` (what each rank does), `contenders.py` (plain
DDP, gradq's codecs, peers), `runners/` (where ranks run), `recording.py` (JSON lines), `summary.py` (medians,
losses, the verdict), `report.py` (Markdown, HTML and plots).
"""
