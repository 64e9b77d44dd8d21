"""Two import packages from two roots: `safecode_kernels` lies at the top, `safecode_mllm` under python/."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["safecode_kernels*"]) + find_packages("python"),
    package_dir={"safecode_mllm": "python/safecode_mllm"},
    # Data is what stands here and no more: by default every file that MANIFEST.in names would count.
    include_package_data=False,
    package_data={
        "safecode_kernels": ["py.typed"],
        "safecode_mllm": ["py.typed", "hazard_world/weights/*"],
    },
)
