import pytest

from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.checkpoints.files import check_checkpoint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ('{"model_type": "llama"}', "has model_type 'llama', but must have one of llava, moe_llava"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="it is no folder, and the hub did not give it"):
        check_checkpoint("owner/name")
