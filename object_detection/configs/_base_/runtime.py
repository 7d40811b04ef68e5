_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["mambavision.openmmlab"], allow_failed_imports=False)
default_hooks = dict(checkpoint=dict(type="SafeCheckpointHook", interval=1))
