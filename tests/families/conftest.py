"""These tests run with torchvision, the others without: `python -m pytest -p tests.families.operators tests/families`."""

import sys

if "tests.families.operators" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]
