"""The packages below the three roots. Everything else is in setup.cfg, which finds packages below one root only."""

from setuptools import find_packages, setup

PACKAGES = {name: root for root in (".", "kernels", "plugins") for name in find_packages(root, include=["hf_qst*"])}

setup(
    packages=list(PACKAGES),
    package_dir={name: f"{root}/{name.replace('.', '/')}" for name, root in PACKAGES.items()},
)
