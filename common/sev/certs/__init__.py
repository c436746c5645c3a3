"""Certificates of a SEV platform: codecs (`sev`, `amd`), containers (`chain`), roots, verification, the printed tree.

`verify` answers "is it genuine" and nothing else; whether a genuine platform is acceptable is the owner's appraisal.
"""
