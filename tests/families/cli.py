"""The command `moe-llava` with torchvision: `python -m tests.families.cli train recipe.yaml`."""

from tests.families import operators  # noqa: F401, I001  before transformers is imported

from moe_llava.cli import main

if __name__ == "__main__":
    main()
