"""Package and dependencies. The ranges resolve together; the version's one home is rsgrpo/__init__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "rsgrpo" / "__init__.py").read_text(), re.MULTILINE)[1]  # type: ignore[index]
README = HERE / "README.md"

setup(
    name="rsgrpo",
    version=VERSION,
    description="Train vision-language models to answer with evidence by reward-scoped GRPO",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Spelled out, it makes `pip install -e .` add this folder to the path. Without it setuptools installs a hook,
    # which is asked only after any folder named conf or rewards where the user starts.
    package_dir={"": "."},
    packages=find_packages(include=["rsgrpo*", "recipes*", "rewards*", "rollout*", "conf*"]),
    package_data={
        "conf": ["**/*.yaml", "**/*.json"],
        "rsgrpo": ["py.typed", "report/assets/*", "lab/assets/*"],
        "recipes": ["py.typed", "evaluation/assets/*", "files/assets/*"],
        **{room: ["py.typed"] for room in ("rewards", "rollout")},
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "torchvision>=0.26,<0.29",
        "transformers>=5.16.1,<5.20",
        "peft>=0.19,<1",
        # default: `ray job submit` needs the job server of the head node. 2.57: from there on Ray ends the whole
        # process group of a worker that died; before, vLLM's own processes stayed, and their GPU memory with them.
        "ray[default]>=2.57,<3",
        "datasets>=4,<6",
        "hydra-core>=1.3.2,<1.4",
        "wandb>=0.31,<1",
        "tensorboard>=2.18,<3",
        "rich>=13.7,<16",
        "jinja2>=3.1,<4",
        "pyarrow>=17",
        "packaging>=24",
        "pillow>=10.4",
        "psutil>=6",
        "numpy>=2,<3",
        "openai>=2.25,<4",
        "pydantic>=2.7,<3",
        "aiohttp>=3.11,<4",
        "pyyaml>=6",
        "openpyxl>=3.1,<4",  # VLMEvalKit's prediction tables
        "huggingface-hub>=1,<3",
    ],
    extras_require={
        # vLLM pins its own torch (0.32: 2.13.0). It is the fast rollout engine; CPU development uses the embedded one.
        "gpu": ["vllm>=0.32,<0.33"],
        # Optional, built against the installed torch: pip install --no-build-isolation -e ".[flash]"
        "flash": ["flash-attn>=2.8,<3"],
        "qlora": ["bitsandbytes>=0.48,<1"],
        "retrieval": [
            "faiss-cpu>=1.11,<2",
            "pypdfium2>=5,<6",
            "sentence-transformers>=6.2,<7",
            "accelerate>=1.10,<2",  # transformers' Trainer, which trains retrievers, needs it; peft brings any version
            "pytrec-eval-terrier>=0.5.10,<0.6",
        ],
        "video": ["av>=12,<19"],
        "app": ["gradio>=6.31,<7"],
        "ocr": ["pytesseract>=0.3.13,<0.4"],
        "demo": ["scikit-learn>=1.5,<2", "easy-vqa>=1,<2"],
        "dev": [
            "pytest>=8.3,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.115,<7",
            "ruff>=0.15,<0.18",
            "mypy>=1.18,<3",
            "playwright>=1.50,<2",
            # For a parity test alone: its smart_resize (0.0.14) gives a page of 3640 x 42 pixels a side of 0, it
            # resizes before we can, and it brings PyAV and requests. rollout/inputs/images.py reads the pages.
            "qwen-vl-utils>=0.0.14,<0.1",
            "pre-commit>=4,<5",
        ],
    },
)
