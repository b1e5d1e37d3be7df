"""What a run must have in common with the one that it continues."""

from pathlib import Path

import pytest

from draftwing.training.checkpoints import check_continued

OLD = {"objective": "eagle3", "learning_rate": 0.001}


def test_a_key_that_is_younger_than_a_record_had_its_default() -> None:
    check_continued(OLD, OLD | {"optimizer": "adamw", "rows": "a hash"}, Path("run"))
    with pytest.raises(ValueError, match="optimizer was 'adamw', is 'muon'"):
        check_continued(OLD, OLD | {"optimizer": "muon"}, Path("run"))


def test_a_changed_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.002.*delete the folder to start over"):
        check_continued(OLD, OLD | {"learning_rate": 0.002}, Path("run"))
