"""The one thing that pyproject.toml cannot say: the folder `conf/` is `dqx/conf` of an installed package."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dqx", "dqx.*"]), "dqx.conf"],
    package_dir={"dqx.conf": "conf"},
)
