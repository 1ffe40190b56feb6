"""Everything is in pyproject.toml; the native kernels' build step joins here (see kernels/README.md)."""

from setuptools import setup

setup()
