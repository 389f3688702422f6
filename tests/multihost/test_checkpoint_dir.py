"""Every host looks at the folder of the checkpoints, and all hear what each has found."""

import pytest

from tests.multihost.test_start import start_both


@pytest.mark.timeout(240)
def test_a_folder_of_checkpoints_that_cannot_be_written_to_stops_all(tmp_path):
    (tmp_path / "file").write_text("")
    config = ("--config", "configs/nano.py:method=cot_sft", "--workdir", str(tmp_path / "run"))
    place = f"--config.checkpoint_dir={tmp_path / 'file' / 'run'}"
    for status, output in start_both("trimpi_jax.train", *config, place):
        assert status == 1, output
        assert "every host must be able to write to --config.checkpoint_dir" in output
        assert "process 0" in output and "process 1" in output and "not writable" in output
        assert "Traceback" not in output
    assert list((tmp_path / "run").iterdir()) == []  # nothing was begun
