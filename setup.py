"""The checkout's root is the package `repa`, whatever the folder is called, with every package in it.

Here and not in pyproject.toml, whose discovery cannot put a prefix before the names that it finds. All else is there.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildModules(build_py):
    """All modules but this file, which lies in the root and would ship as `repa.setup`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("repa", "setup")]


setup(
    packages=["repa", *(f"repa.{name}" for name in find_packages())],
    package_dir={"repa": "."},
    cmdclass={"build_py": BuildModules},
)
