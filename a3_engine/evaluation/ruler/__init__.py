"""The generated tests of RULER (arXiv 2404.06654, github.com/NVIDIA/RULER, Apache-2.0).

Wording, settings and scoring are RULER's. The haystack that it calls "essay" is any text here.
"""
