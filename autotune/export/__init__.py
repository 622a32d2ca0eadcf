"""What leaves the system: bundles, reports and pictures made from records.

Nothing here measures, searches or asks a database; `bundle.py` writes and reads the exported
winner, `report.py` the page for people.
"""
