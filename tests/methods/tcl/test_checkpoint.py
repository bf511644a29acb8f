from helpers.official_tcl import random_state

from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods.tcl.checkpoint import import_checkpoint
from lexiseg.storage import load_tensors, save_tensors


def test_a_released_file_gets_temperatures_and_can_be_saved(tmp_path):
    state = random_state(clip=False)
    assert not any("logit_scale" in name for name in state)
    checkpoint = ForeignCheckpoint(file="tcl.pth", sha256="", tensors=state)
    imported = import_checkpoint(checkpoint, {"temperature": 0.5})
    save_tensors(tmp_path / "model.safetensors", dict(imported.tensors))
    kept = load_tensors(tmp_path / "model.safetensors")
    assert float(kept["image_log_scale"].exp()) == float(kept["feature_log_scale"].exp()) == 2.0
