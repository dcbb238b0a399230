"""The gallery: a small StableDiffusion3 pipeline that draws 24 things in six styles, and the classifier that reads it.

fastunlearn finds it by the entry point ``fastunlearn.worlds`` of this package.
"""

__version__ = "0.1.0"
