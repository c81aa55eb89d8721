"""The report, one HTML page that shows a run: write.py reads it, examine.py scores tokens, page.py makes the HTML."""
