"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from absl import flags
from data_zoo import write_zoo

# Worker processes are handed the parsed flags of absl; pytest parses none.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """A folder of good, convertible and broken image files: see `data_zoo`."""
    root = tmp_path_factory.mktemp("zoo")
    write_zoo(root)
    return root
