"""The packages, one by one; everything else is in pyproject.toml.

`fastrl/kernels` is a tracked symlink to `kernels/` without an `__init__.py`: a top-level importable `kernels` would
hide the PyPI package of that name, which transformers looks for. Listed by name it lands in wheels as real files.
"""

from setuptools import setup

PACKAGES = [
    "fastrl",
    "fastrl.data",
    "fastrl.kernels",
    "fastrl.losses",
    "fastrl.models",
    "fastrl.ops",
    "fastrl.quickstart",
    "fastrl.rewards",
    "fastrl.rollout",
    "fastrl.train",
    "fastrl.train.stages",
]

if __name__ == "__main__":
    setup(packages=PACKAGES, package_data={"fastrl": ["**/*.jsonl"]}, include_package_data=False)
