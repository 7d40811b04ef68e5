_base_ = "mmseg::_base_/default_runtime.py"

custom_imports = dict(
    imports=["mambavision.openmmlab", "mambavision.openmmlab.segman_decoder"], allow_failed_imports=False
)
