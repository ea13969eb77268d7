from setuptools import find_packages, setup

setup(packages=["sotto", *(f"sotto.{name}" for name in find_packages("src"))], package_dir={"sotto": "src"})
