"""Promotion of a registered version to production, on evidence; and the way back.

`examine` measures, `decide` writes what follows from it; what was decided is read by `lexiseg history`.
"""
