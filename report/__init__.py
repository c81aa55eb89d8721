"""The report, one HTML page that shows a run: write.py reads it, charts.py draws, examine.py scores tokens."""
