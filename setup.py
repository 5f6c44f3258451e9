"""The packages, one by one; everything else is in pyproject.toml.

`fastrl/kernels` is a tracked symlink to `kernels/` without an `__init__.py`: a top-level importable `kernels` would
hide the PyPI package of that name, which transformers looks for. Listed by name it lands in wheels as real files.

`fastrl/_native` is csrc/ compiled: a plain C library that is loaded with ctypes. It is optional: where it does not
compile, a warning is printed and everything runs without it.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGES = [
    "fastrl",
    "fastrl.advantages",
    "fastrl.bench",
    "fastrl.data",
    "fastrl.integrations",
    "fastrl.integrations.trl",
    "fastrl.kernels",
    "fastrl.losses",
    "fastrl.models",
    "fastrl.ops",
    "fastrl.quickstart",
    "fastrl.rewards",
    "fastrl.rollout",
    "fastrl.train",
    "fastrl.train.configs",
    "fastrl.train.optim",
    "fastrl.train.plan",
    "fastrl.train.stages",
]

# No -fopenmp at link time: the library takes the OpenMP that torch has brought into the process.
NATIVE = Extension(
    "fastrl._native",
    sources=["csrc/native.cpp"],
    depends=["csrc/gemm.h", "csrc/gemm_isa.h", "csrc/rows.h", "csrc/rows_isa.h", "csrc/vector.h"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-fno-math-errno", "-Wno-psabi", "-fopenmp"],
    optional=True,
)


class BuildNative(build_ext):
    """Without OpenMP where the compiler has none: one thread is better than none."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"{ext.name}: trying again without OpenMP ({error})")
            ext.extra_compile_args = [flag for flag in ext.extra_compile_args if flag != "-fopenmp"]
            super().build_extension(ext)


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_data={"fastrl": ["**/*.jsonl"]},
        include_package_data=False,
        ext_modules=[NATIVE],
        cmdclass={"build_ext": BuildNative},
    )
