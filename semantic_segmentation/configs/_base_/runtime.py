_base_ = "mmseg::_base_/default_runtime.py"

custom_imports = dict(imports=["mambavision.openmmlab"], allow_failed_imports=False)
