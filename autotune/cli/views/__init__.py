"""How each noun is shown, one file per noun: columns for people, fields for programs.

Owns titles, units and order. Formats are `output.py`'s work, number texts `figures.py`'s.
"""
