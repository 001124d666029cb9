"""The checkout's root is the package `repa`, whatever the folder is called, with every package in it.

Here and not in pyproject.toml, whose discovery cannot put a prefix before the names that it finds. All else is there.
"""

from setuptools import find_packages, setup

setup(packages=["repa", *(f"repa.{name}" for name in find_packages())], package_dir={"repa": "."})
